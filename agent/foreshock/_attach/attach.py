"""`attach`: the one call that a script makes, on every rank."""

from __future__ import annotations

import os
import platform
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foreshock._arithmetic.arithmetic import Arithmetic, arithmetic_for
from foreshock._arithmetic.parameters import ParameterPlan, model_summary
from foreshock._attach.agreement import Agreement, RankProposal
from foreshock._attach.identity import free_name, launch_name, local_rank, node_name, run_name
from foreshock._attach.inherited import CAPABILITY, inherited_history, wants_history
from foreshock._attach.models import (
    WatchedModel,
    checked_model,
    checked_plan,
    inner_optimizer,
    sharded_parameters,
)
from foreshock._attach.ranks import Ranks
from foreshock._attach.settings import Settings, kill_switch, settings_from
from foreshock._attach.variables import unknown_variables
from foreshock._control.clip import Clip
from foreshock._control.optimizer import divides_gradients, why_not_skipped
from foreshock._errors import SettingsError
from foreshock._handle import DisabledWatch, Watch
from foreshock._hooks.ddp import comm_hook_taken, needs_comm_hook, observe_backward
from foreshock._hooks.sharded import observe_shards
from foreshock._kernels.choice import step_kernel, wants_kernel, why_not
from foreshock._log import rank_zero_info, rank_zero_warn_once, set_rank
from foreshock._measure.shards import ShardSums
from foreshock._mirror.mirror import NOTICES, Mirror
from foreshock._output.device_record import DeviceRecord, record_for
from foreshock._output.leaving import detach_all, make_room, runs_in_use
from foreshock._output.new_ring import new_ring
from foreshock._output.record import Record
from foreshock._output.recorder_process import RecorderProcess
from foreshock._stages import Policy, replica_stages, sharded_stages
from foreshock._torch import original_type
from foreshock._version import __version__
from foreshock._watch import ActiveWatch
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.ring import Ring

if TYPE_CHECKING:
    from foreshock._kernels.launches import StepKernel


_by_script = False
"""Whether the script has called `attach`."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | Clip | None = None,
    skip: bool | None = None,
    dry_run: bool | None = None,
    collector: str | None = None,
    experiment: str | None = None,
    run: str | None = None,
    local_norms: bool | None = None,
) -> Watch:
    """Watch a model's gradients, on every rank, from the next step on. Call it once, after making the optimizer.

    model: a `DistributedDataParallel`, or one that `fully_shard` was applied to; any module in a job of one process.
    optimizer: holds its parameters. Either may be as Accelerate, Fabric or `torch.compile` returned it.
    clip: largest L2 norm, `NormClip`, `ValueClip`, `AdaptiveClip`, or None to observe only. A script's own clipping
    must go.
    skip: leave out steps whose gradient is not finite or far beyond the run's history, three in a row and five in a
    hundred at most (default no; needs a fused optimizer). See `Watch.tripped`.
    dry_run: do neither, and count what would have been done (default no). See `Watch.dry_run_counts`.
    collector: host:port; default this machine. experiment, run: names; the run's default comes from the launcher.
    local_norms: measure each rank's gradient before the all-reduce (default yes; never of a sharded model).

    Every argument has an environment twin, `FORESHOCK_CLIP` and so on, which holds where the argument is not given.
    `FORESHOCK_DISABLED=1` on any rank turns Foreshock off on all.

    Blocks until every rank has called it, at most 60 seconds; five more where a run that resumes, and clips or skips by
    its history, asks the collector for that of its last attempt. Raises `SettingsError` for a wrong argument and
    `AttachError` where ranks are missing or disagree; never raises into training after that.
    """
    global _by_script
    if not _by_script:
        _by_script = True
        detach_all()
    return attach_without_script(
        model,
        optimizer,
        clip=clip,
        skip=skip,
        dry_run=dry_run,
        collector=collector,
        experiment=experiment,
        run=run,
        local_norms=local_norms,
    )


def called_by_script() -> bool:
    """Return whether the script has called `attach`: then `foreshock run` leaves everything to it."""
    return _by_script


def attach_without_script(model: nn.Module, optimizer: torch.optim.Optimizer, **arguments: Any) -> Watch:
    """Do what `attach` does, with the same arguments, where the script has not called it."""
    ranks, optimizer = Ranks(model), inner_optimizer(optimizer)
    set_rank(ranks.rank)
    try:
        config = None
        if not kill_switch():
            settings = settings_from(**arguments)
            watched = checked_model(model)
            plan = checked_plan(watched, optimizer)
            _check_skip(optimizer, settings)
            config = LocalConfig(model=watched, optimizer=optimizer, plan=plan, settings=settings)
            for line in unknown_variables(os.environ):
                rank_zero_warn_once(line, line)
    except SettingsError as error:
        # The others must not wait for this rank, nor hook up without it.
        ranks.leave(RankProposal(version=__version__, error=str(error)))
        raise
    if config is None:
        ranks.leave(RankProposal(version=__version__, disabled=True))
        return DisabledWatch()
    return _attach(config, ranks)


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Holds the checked arguments of this rank."""

    model: WatchedModel
    optimizer: torch.optim.Optimizer
    plan: ParameterPlan
    settings: Settings

    def proposal(
        self,
        error: str = "",
        *,
        triton: bool = False,
        kernel_error: str = "",
        history: dict[str, float | None] | None = None,
    ) -> RankProposal:
        return RankProposal(
            version=__version__,
            clip=str(self.settings.clip or "none"),
            skip=self.settings.skip,
            dry_run=self.settings.dry_run,
            experiment=self.settings.experiment,
            local_norms=self.settings.local_norms and not self.model.sharded,
            error=error,
            triton=triton,
            kernel_error=kernel_error,
            needs_comm_hook=self.model.ddp is not None and needs_comm_hook(self.model.ddp),
            comm_hook_taken=self.model.ddp is not None and comm_hook_taken(self.model.ddp),
            resumes=wants_history(self.settings, self.optimizer),
            history=history or {},
        )


def _attach(config: LocalConfig, ranks: Ranks) -> Watch:
    settings = config.settings
    agreement = ranks.agree(
        config.proposal(),
        run=free_name(run_name(settings.run, os.environ), runs_in_use()) if ranks.rank == 0 else "",
        launch=launch_name() if ranks.rank == 0 else "",
        timeout=settings.attach_timeout,
    )
    if agreement.disabled:
        return DisabledWatch()
    # What may fail on one machine and not on another comes before the second agreement, every hook after it.
    failure, ring, record = "", None, None
    arithmetic = arithmetic_for(config.plan.device())
    try:
        identity = _identity(config, agreement, ranks)
        ring = new_ring(agreement.run, agreement.launch, ranks.rank, identity, layers=len(config.plan.layers))
        record = record_for(ring, config.plan.device(), arithmetic)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    kernel, kernel_error = (None, "") if failure else _kernel(config, agreement)
    try:
        proposal = config.proposal(failure, triton=kernel is not None, kernel_error=kernel_error)
        ready = ranks.agree(proposal, timeout=settings.attach_timeout)
    except BaseException:
        _withdraw(ring)
        raise
    if ready.disabled or record is None:
        _withdraw(ring)
        return DisabledWatch()
    if agreement.local_norms_missing:
        line = (
            "the model already has a communication hook, so only global norms are measured; "
            "for local norms, register foreshock.local_norms_wrapper(hook) instead, or set neither "
            "gradient_as_bucket_view nor static_graph"
        )
        rank_zero_info(line, rank=ranks.rank)
    if config.model.sharded:
        line = "the model is sharded, so only global norms are measured: not each rank's own gradient, nor the weights"
        rank_zero_info(line, rank=ranks.rank)
    if ready.kernel_error:
        line = f"Triton's kernels do not run on {ready.kernel_error}; each step launches more, on every rank"
        rank_zero_info(line, rank=ranks.rank)
    if not ready.triton:
        kernel = None
    if kernel is not None and isinstance(record, DeviceRecord):
        record.observe_by(kernel.write_observed)
    recorder = RecorderProcess(
        record.ring.path.parent,
        run=agreement.run,
        collector=settings.collector,
        python=settings.recorder_python,
        logs=ranks.rank == 0,
    )
    recorder.ensure()
    # First: an attempt of this process that goes on would make this a run of its own, without history.
    make_room(config.model.root, config.optimizer)
    history = _agreed_history(config, agreement, ranks, arithmetic, record.ring, recorder)
    watch = _watched(config, agreement, arithmetic, kernel, record, recorder)
    watch.load_state_dict(history)
    if settings.mirror and ranks.rank == 0:
        watch.mirror = Mirror(settings.mirror)
    rank_zero_info(_line(config, agreement, ranks.size), rank=ranks.rank)
    return watch


def _watched(
    config: LocalConfig,
    agreement: Agreement,
    arithmetic: Arithmetic,
    kernel: StepKernel | None,
    record: Record,
    recorder: RecorderProcess,
) -> ActiveWatch:
    """Make the parts of a watch for this kind of model, and register its hooks."""
    settings, model, optimizer, plan = config.settings, config.model, config.optimizer, config.plan
    policy = Policy(clip=settings.clip, skip=settings.skip, dry_run=settings.dry_run)
    shard_sums = None
    if model.sharded:
        assert model.group is not None
        shard_sums = ShardSums(sharded_parameters(model), model.group, model.replicas, arithmetic)
        stages = sharded_stages(optimizer, plan, arithmetic, policy, shard_sums)
    else:
        stages = replica_stages(
            model.group,
            optimizer,
            plan,
            arithmetic,
            policy,
            kernel,
            local_norms=agreement.local_norms,
            views=model.ddp is not None and model.ddp.gradient_as_bucket_view,
        )
    watch = ActiveWatch(
        model=model.root,
        rank=0 if model.group is None else model.group.rank(),
        ranks=model.ranks,
        optimizer=optimizer,
        arithmetic=arithmetic,
        stages=stages,
        clips=settings.clip is not None,
        by_bucket=agreement.by_bucket,
        record=record,
        recorder=recorder,
        strict=settings.strict,
    )
    if shard_sums is not None:
        watch.backward_hooks = observe_shards(model.root, watch, shard_sums)
    else:
        rank_sums = stages.rank_sums
        by_bucket = agreement.by_bucket and rank_sums is not None
        watch.backward_hooks = observe_backward(model.root, watch, rank_sums, by_bucket=by_bucket)
    return watch


def _kernel(config: LocalConfig, agreement: Agreement) -> tuple[StepKernel | None, str]:
    """Return the kernels that decide, or why they do not run here. Neither where they are not wanted."""
    settings = config.settings
    by_bucket = agreement.by_bucket and agreement.local_norms and config.model.ranks > 1
    if config.model.sharded or not wants_kernel(config.plan, clip=settings.clip, by_bucket=by_bucket):
        return None, ""
    try:
        return step_kernel(config.plan, clip=settings.clip, skip=settings.skip, dry_run=settings.dry_run), ""
    except Exception as error:
        return None, why_not(error)


def _agreed_history(
    config: LocalConfig,
    agreement: Agreement,
    ranks: Ranks,
    arithmetic: Arithmetic,
    ring: Ring,
    recorder: RecorderProcess,
) -> dict[str, float | None]:
    """Return the history that every rank begins with: the one that rank 0 has got by now, or none."""
    if not agreement.resumes:
        return {}
    found = inherited_history(ring, recorder, arithmetic) if ranks.rank == 0 else {}
    try:
        history = ranks.agree(config.proposal(history=found), timeout=config.settings.attach_timeout).history
    except BaseException:
        _withdraw(ring)
        raise
    if history:
        line = "continuing the history of norms that the collector has of this run"
        rank_zero_info(line, rank=ranks.rank)
    return history


def _withdraw(ring: Ring | None) -> None:
    """Nobody watches. A recorder that has seen the ring already must not take its end for a death."""
    if ring is not None:
        ring.write_exit(ExitReason.DETACHED)
        with suppress(OSError):
            ring.path.unlink()


def _identity(config: LocalConfig, agreement: Agreement, ranks: Ranks) -> dict[str, Any]:
    """What the ring's header says, for the recorder's `Hello`."""
    optimizer = config.optimizer
    return {
        "schema_version": 1,
        "instance": f"{agreement.launch}-{ranks.rank}-{secrets.token_hex(4)}",
        "token": secrets.token_hex(16),
        "experiment": config.settings.experiment,
        "run": agreement.run,
        "launch_id": agreement.launch,
        "started_seconds": time.time(),
        "rank": ranks.rank,
        "local_rank": local_rank(ranks.rank),
        "world_size": ranks.size,
        "node": node_name(),
        "clip": str(config.settings.clip or "none"),
        "capabilities": _capabilities(config.settings, agreement, ranks.rank),
        "versions": {
            "foreshock": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "model": model_summary(config.model.module, config.plan),
        "optimizer": {"type": type(optimizer).__name__, "fused": divides_gradients(optimizer)},
        "collector": config.settings.collector,
    }


def _capabilities(settings: Settings, agreement: Agreement, rank: int) -> list[str]:
    found = ["local_norms"] if agreement.local_norms else []
    if rank == 0:
        found += [CAPABILITY] if agreement.resumes else []
        found += [NOTICES] if settings.mirror else []
    return found


def _line(config: LocalConfig, agreement: Agreement, size: int) -> str:
    settings, plan = config.settings, config.plan
    does = [f"clipping by {settings.clip}"] if settings.clip else []
    does += ["skipping bad steps"] if settings.skip else []
    clip = ("trying " if settings.dry_run else "") + " and ".join(does) if does else "observing only"
    where = settings.collector or "this machine's collector"
    ranks = f"{size} rank{'s' if size > 1 else ''}"
    model = original_type(config.model.module).__name__
    return (
        f"watching {model} ({len(plan.layers)} layers, {len(plan.parameters)} parameters) on {ranks}, {clip}; "
        f"run {agreement.run} to {where}"
    )


def _check_skip(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    if settings.skip and not settings.dry_run and (why := why_not_skipped(optimizer)):
        raise SettingsError(f"skip: {why}; dry_run=True only counts")
