"""`attach`: the one call that a script makes, on every rank."""

from __future__ import annotations

import os
import platform
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from foreshock._agreement import Decision, Posting, agree
from foreshock._buckets import hook_taken, watch_buckets
from foreshock._clip import Clip
from foreshock._errors import AttachError, SettingsError
from foreshock._handle import DisabledWatch, Watch
from foreshock._identity import launch_name, local_rank, node_name, run_name
from foreshock._kernel import clips_in_kernel, why_not_skipped
from foreshock._launch import RecorderProcess, announce
from foreshock._leaving import is_watched, make_room
from foreshock._log import rank_zero_warn_once, set_rank
from foreshock._records import Records
from foreshock._settings import Settings, kill_switch, settings_from
from foreshock._summary import ParameterPlan, model_summary, plan_parameters, trainable
from foreshock._variables import unknown_variables
from foreshock._version import __version__
from foreshock._watch import ActiveWatch
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_folder, ring_name
from foreshock_recorder.ring import Ring


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | Clip | None = None,
    skip: bool | None = None,
    shadow: bool | None = None,
    collector: str | None = None,
    experiment: str | None = None,
    run: str | None = None,
    local_norms: bool | None = None,
) -> Watch:
    """Watch a DDP model's gradients, on every rank, from the next step on. Call it once, after making the optimizer.

    model: a `DistributedDataParallel` on one device. optimizer: holds its parameters.
    clip: largest L2 norm, `NormClip`, `ValueClip`, `AdaptiveClip`, or None to observe only. A script's own clipping
    must go.
    skip: leave out steps whose gradient is not finite or far beyond the run's history, three in a row and five in a
    hundred at most (default no; needs a fused optimizer). See `Watch.tripped`.
    shadow: do neither, and count what would have been done (default no). See `Watch.shadow_counts`.
    collector: host:port; default this machine. experiment, run: names; the run's default comes from the launcher.
    local_norms: measure each rank's gradient before the all-reduce (default yes; needs DDP's communication hook).

    Every argument has an environment twin, `FORESHOCK_CLIP` and so on, which holds where the argument is not given.
    `FORESHOCK_DISABLED=1` on any rank turns Foreshock off on all.

    Blocks until every rank has called it, at most 60 seconds. Raises `SettingsError` for a wrong argument and
    `AttachError` where ranks are missing or disagree; never raises into training after that.
    """
    ranks = _Ranks(model)
    set_rank(ranks.rank)
    try:
        mine = None
        if not kill_switch():
            settings = settings_from(
                clip=clip,
                skip=skip,
                shadow=shadow,
                collector=collector,
                experiment=experiment,
                run=run,
                local_norms=local_norms,
            )
            ddp = _checked_model(model)
            plan = _checked_plan(ddp, optimizer)
            _check_skip(optimizer, settings)
            mine = _Mine(model=ddp, optimizer=optimizer, plan=plan, settings=settings)
            for line in unknown_variables(os.environ):
                rank_zero_warn_once(line, line)
    except SettingsError as error:
        # The others must not wait for this rank, nor hook up without it.
        ranks.leave(Posting(version=__version__, error=str(error)))
        raise
    if mine is None:
        ranks.leave(Posting(version=__version__, disabled=True))
        return DisabledWatch()
    return _attach(mine, ranks)


@dataclass(frozen=True, kw_only=True)
class _Mine:
    """What this rank was told, checked."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    plan: ParameterPlan
    settings: Settings

    def posting(self, error: str = "") -> Posting:
        return Posting(
            version=__version__,
            clip=str(self.settings.clip or "none"),
            skip=self.settings.skip,
            shadow=self.settings.shadow,
            experiment=self.settings.experiment,
            local_norms=self.settings.local_norms,
            error=error,
            hook_taken=hook_taken(self.model),
        )


def _attach(mine: _Mine, ranks: _Ranks) -> Watch:
    settings = mine.settings
    decision = ranks.agree(
        mine.posting(),
        run=run_name(settings.run, os.environ) if ranks.rank == 0 else "",
        launch=launch_name() if ranks.rank == 0 else "",
        timeout=settings.attach_timeout,
    )
    if decision.disabled:
        return DisabledWatch()
    # What may fail on one machine and not on another comes before the second agreement, every hook after it.
    folder = ring_folder(decision.run, decision.launch)
    path = folder / ring_name(decision.launch, ranks.rank)
    failure, ring, records = "", None, None
    try:
        ring = Ring.create(path, _identity(mine, decision, ranks), layers=len(mine.plan.layers))
        records = Records(ring, mine.plan.device())
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    try:
        ready = ranks.agree(mine.posting(failure), timeout=settings.attach_timeout)
    except BaseException:
        _withdraw(ring)
        raise
    if ready.disabled or records is None:
        _withdraw(ring)
        return DisabledWatch()
    if decision.hook_taken:
        line = (
            "the model already has a communication hook, so only global norms are measured; "
            "for local norms, register foreshock.local_norms_wrapper(hook) instead"
        )
        announce(line, rank=ranks.rank)
    recorder = RecorderProcess(
        folder,
        run=decision.run,
        collector=settings.collector,
        python=settings.recorder_python,
        speaks=ranks.rank == 0,
    )
    recorder.ensure()
    make_room(mine.model, mine.optimizer)
    watch = ActiveWatch(
        model=mine.model,
        optimizer=mine.optimizer,
        plan=mine.plan,
        clip=settings.clip,
        skip=settings.skip,
        shadow=settings.shadow,
        local_norms=decision.local_norms,
        records=records,
        recorder=recorder,
        strict=settings.strict,
    )
    if decision.local_norms:
        watch_buckets(mine.model, watch, watch.sums)
    announce(_line(mine, decision, ranks.size), rank=ranks.rank)
    return watch


def _withdraw(ring: Ring | None) -> None:
    """Nobody watches. A recorder that has seen the ring already must not take its end for a death."""
    if ring is not None:
        ring.write_exit(ExitReason.DETACHED)
        with suppress(OSError):
            ring.path.unlink()


def _identity(mine: _Mine, decision: Decision, ranks: _Ranks) -> dict[str, Any]:
    """What the ring's header says, for the recorder's `Hello`."""
    optimizer = mine.optimizer
    return {
        "schema_version": 1,
        "instance": f"{decision.launch}-{ranks.rank}-{secrets.token_hex(4)}",
        "experiment": mine.settings.experiment,
        "run": decision.run,
        "launch_id": decision.launch,
        "started_seconds": time.time(),
        "rank": ranks.rank,
        "local_rank": local_rank(ranks.rank),
        "world_size": ranks.size,
        "node": node_name(),
        "clip": str(mine.settings.clip or "none"),
        "capabilities": ["local_norms"] if decision.local_norms else [],
        "versions": {
            "foreshock": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "model": model_summary(mine.model.module, mine.plan),
        "optimizer": {"type": type(optimizer).__name__, "fused": clips_in_kernel(optimizer)},
        "collector": mine.settings.collector,
    }


def _line(mine: _Mine, decision: Decision, size: int) -> str:
    settings, plan = mine.settings, mine.plan
    does = [f"clipping by {settings.clip}"] if settings.clip else []
    does += ["skipping bad steps"] if settings.skip else []
    clip = ("trying " if settings.shadow else "") + " and ".join(does) if does else "observing only"
    where = settings.collector or "this machine's collector"
    ranks = f"{size} rank{'s' if size > 1 else ''}"
    model = type(mine.model.module).__name__
    return (
        f"watching {model} ({len(plan.layers)} layers, {len(plan.parameters)} parameters) on {ranks}, {clip}; "
        f"run {decision.run} to {where}"
    )


class _Ranks:
    """The ranks that have to agree: those of the model's process group, through the job's own store."""

    def __init__(self, model: nn.Module) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            # A model that is none of DDP's is an error, and one that the default group's ranks have to hear.
            self._group = getattr(_unwrapped(model), "process_group", None) or dist.group.WORLD
            self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def agree(
        self, posting: Posting, *, run: str = "", launch: str = "", timeout: float = 0.0, silent: bool = False
    ) -> Decision:
        """One agreement of all. Rank 0 says why nobody watches, unless it raises why."""
        assert self._group is not None
        store = PrefixStore(f"foreshock/{self._group.group_name}", _get_default_store())
        decision = agree(
            store,
            rank=self.rank,
            world_size=self.size,
            posting=posting,
            run=run,
            launch=launch,
            timeout=timeout,
        )
        if decision.disabled and not silent:
            announce(f"not watching: {decision.disabled}", rank=self.rank)
        return decision

    def leave(self, posting: Posting) -> None:
        """Tell the others that this rank does not take part; waits for nobody."""
        if self._group is not None:
            with suppress(AttachError):
                self.agree(posting, silent=bool(posting.error))


def _unwrapped(model: nn.Module) -> nn.Module:
    # torch.compile keeps the module that it wraps.
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else model


def _checked_model(model: nn.Module) -> DistributedDataParallel:
    inner = _unwrapped(model)
    if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(inner).__mro__):
        raise SettingsError("model: FSDP shards gradients, so no rank has a complete one; only DDP is supported")
    if not isinstance(inner, DistributedDataParallel):
        wrap = "wrap it first: DistributedDataParallel(model)"
        raise SettingsError(f"model: must be a DistributedDataParallel, not {type(model).__name__}; {wrap}")
    if any(getattr(module, "sparse", False) is True for module in inner.module.modules()):
        raise SettingsError(
            "model: has an embedding with sparse gradients, whose norm is not measured; use sparse=False"
        )
    if any(parameter.is_complex() for parameter in inner.module.parameters()):
        raise SettingsError(
            "model: has complex parameters, whose gradients are not measured; store them as torch.view_as_real"
        )
    return inner


def _checked_plan(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> ParameterPlan:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingsError(f"optimizer: must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise SettingsError("optimizer: ZeroRedundancyOptimizer ignores hooks; use a plain optimizer")
    plan = plan_parameters(model.module, optimizer, model.parameters_to_ignore)
    if not plan.parameters:
        raise SettingsError("optimizer: holds none of the model's parameters; create it from model.parameters()")
    if others := set(trainable(optimizer)) - set(model.module.parameters()):
        raise SettingsError(
            f"optimizer: holds {len(others)} parameter(s) of another model, whose gradients this DDP model does not "
            "average; give each model its own optimizer"
        )
    devices = {parameter.device for parameter in plan.parameters}
    if len(devices) > 1:
        raise SettingsError(f"model: its parameters are on {len(devices)} devices; Foreshock supports one per rank")
    if is_watched(optimizer):
        raise SettingsError("optimizer: is already watched; detach that watch first")
    if is_watched(model):
        raise SettingsError(
            "model: is already watched with another optimizer, and only one can be watched at a time; attach to the "
            "one that matters, or detach that watch first"
        )
    return plan


def _check_skip(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    if settings.skip and not settings.shadow and (why := why_not_skipped(optimizer)):
        raise SettingsError(f"skip: {why}; shadow=True only counts")
