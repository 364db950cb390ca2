"""`attach`: the one call that a script makes, on every rank."""

from __future__ import annotations

import os
import platform
import secrets
import time
from multiprocessing.util import Finalize

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from foreshock._agreement import Decision, Posting, agree, post
from foreshock._clip import NormClip, ValueClip
from foreshock._errors import SettingsError
from foreshock._hooks import hook_taken, watch_buckets
from foreshock._identity import launch_name, local_rank, node_name, run_name
from foreshock._launch import RecorderProcess, announce
from foreshock._records import Records
from foreshock._settings import Settings, settings_from
from foreshock._summary import ParameterPlan, model_summary, plan_parameters
from foreshock._version import __version__
from foreshock._watch import ActiveWatch, DisabledWatch, Watch, clips_in_kernel, is_watched
from foreshock_recorder.ring import Ring, ring_folder, ring_name

_attaches = 0


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | NormClip | ValueClip | None = None,
    collector: str | None = None,
    experiment: str | None = None,
    run: str | None = None,
    local_norms: bool | None = None,
) -> Watch:
    """Watch a DDP model's gradients, on every rank, from the next step on. Call it once, after making the optimizer.

    model: a `DistributedDataParallel` on one device. optimizer: holds its parameters.
    clip: largest L2 norm, `NormClip`, `ValueClip`, or None to observe only. A script's own clipping must go.
    collector: host:port; default this machine. experiment, run: names; the run's default comes from the launcher.
    local_norms: measure each rank's gradient before the all-reduce (default yes; needs DDP's communication hook).

    Every argument has an environment twin, `FORESHOCK_CLIP` and so on, which holds where the argument is not given.
    `FORESHOCK_DISABLED=1` on any rank turns Foreshock off on all.

    Blocks until every rank has called it, at most 60 seconds. Raises `SettingsError` for a wrong argument and
    `AttachError` where ranks are missing or disagree; never raises into training after that.
    """
    ddp = _checked_model(model)
    group = ddp.process_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    store = _store()
    try:
        settings = settings_from(
            clip=clip, collector=collector, experiment=experiment, run=run, local_norms=local_norms
        )
        plan = _checked_plan(ddp, optimizer)
    except SettingsError as error:
        # The others must not wait for this rank, nor hook up without it.
        post(store, rank, _posting(error=str(error)))
        raise
    decision = agree(
        store,
        rank=rank,
        world_size=world_size,
        posting=_posting(settings, hook_taken=hook_taken(ddp)),
        run=run_name(settings.run, os.environ) if rank == 0 else "",
        launch=launch_name() if rank == 0 else "",
        timeout=settings.attach_timeout,
    )
    if decision.disabled:
        announce(f"not watching: {decision.disabled}", rank=rank)
        return DisabledWatch()
    if decision.hook_taken:
        announce("the model has a communication hook already: no local norms, only global ones", rank=rank)
    return _watch(ddp, optimizer, plan, settings, decision, rank=rank, world_size=world_size)


def _watch(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    plan: ParameterPlan,
    settings: Settings,
    decision: Decision,
    *,
    rank: int,
    world_size: int,
) -> Watch:
    folder = ring_folder(decision.run)
    summary = model_summary(model.module, plan)
    local = local_rank(rank)
    identity = {
        "schema_version": 1,
        "instance": f"{decision.launch}-{rank}-{secrets.token_hex(4)}",
        "experiment": settings.experiment,
        "run": decision.run,
        "launch": decision.launch,
        "started_seconds": time.time(),
        "rank": rank,
        "local_rank": local,
        "world_size": world_size,
        "node": node_name(),
        "clip": str(settings.clip or "none"),
        "capabilities": ["local_norms"] if decision.local_norms else [],
        "versions": {
            "foreshock": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "model": summary,
        "optimizer": {"type": type(optimizer).__name__, "fused": clips_in_kernel(optimizer)},
        "collector": settings.collector,
    }
    ring = Ring.create(folder / ring_name(decision.launch, rank), identity, layers=len(plan.layers))
    recorder = RecorderProcess(folder, collector=settings.collector, python=settings.recorder_python, speaks=rank == 0)
    recorder.ensure()
    watch = ActiveWatch(
        model=model,
        optimizer=optimizer,
        plan=plan,
        clip=settings.clip,
        local_norms=decision.local_norms,
        records=Records(ring, plan.device()),
        recorder=recorder,
        strict=settings.strict,
    )
    if decision.local_norms:
        watch_buckets(model, watch)
    # A finalizer of multiprocessing runs at the end of spawned processes too, where atexit does not.
    Finalize(None, watch.leave_at_exit, exitpriority=100)
    announce(_line(settings, decision, summary["type"], plan, world_size), rank=rank)
    return watch


def _line(settings: Settings, decision: Decision, model: str, plan: ParameterPlan, world_size: int) -> str:
    clip = f"clipping by {settings.clip}" if settings.clip else "observing only"
    where = settings.collector or "this machine's collector"
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return (
        f"watching {model} ({len(plan.layers)} layers, {len(plan.parameters)} parameters) on {ranks}, {clip}; "
        f"run {decision.run} to {where}; foreshock status {decision.run}"
    )


def _posting(settings: Settings | None = None, *, hook_taken: bool = False, error: str = "") -> Posting:
    return Posting(
        version=__version__,
        clip="" if settings is None else str(settings.clip or "none"),
        local_norms=settings is None or settings.local_norms,
        disabled=settings is not None and settings.disabled,
        error=error,
        hook_taken=hook_taken,
    )


def _checked_model(model: nn.Module) -> DistributedDataParallel:
    if not isinstance(model, DistributedDataParallel):
        # torch.compile keeps the module that it wraps.
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, DistributedDataParallel):
            wrap = "wrap it first: DistributedDataParallel(model)"
            raise SettingsError(f"model: must be a DistributedDataParallel, not {type(model).__name__}; {wrap}")
        model = inner
    return model


def _checked_plan(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> ParameterPlan:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingsError(f"optimizer: must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise SettingsError("optimizer: ZeroRedundancyOptimizer ignores hooks; use a plain optimizer")
    plan = plan_parameters(model.module, optimizer)
    ours = set(model.module.parameters())
    if not any(parameter in ours for parameter in plan.parameters):
        raise SettingsError("optimizer: holds none of the model's parameters; make it from model.parameters()")
    devices = {parameter.device for parameter in plan.parameters}
    if len(devices) > 1:
        raise SettingsError(f"model: its parameters lie on {len(devices)} devices; Foreshock watches one per rank")
    if is_watched(optimizer):
        raise SettingsError("optimizer: is being watched already; detach that watch first")
    return plan


def _store() -> Store:
    """A corner of the job's own store for this attach: ranks attach in the same order, as with any collective."""
    global _attaches
    _attaches += 1
    return PrefixStore(f"foreshock/{_attaches}", _get_default_store())
