"""The stages of a step before its record: measure, decide, apply. Chosen once, at attach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._control.apply import Apply, DryRun
from foreshock._control.clip import Clip, ValueClip
from foreshock._control.decide import Decide
from foreshock._control.optimizer import OptimizerControl
from foreshock._measure.measure import Measure
from foreshock._measure.rank_sums import RankSums, Sums
from foreshock._measure.shards import ShardedMeasure, ShardSums
from foreshock._step import Step

if TYPE_CHECKING:
    from foreshock._kernels.launches import StepKernel


class Decider(Protocol):
    """Decides whether to scale a step's gradient, skip the step, or do nothing."""

    def decide(self, step: Step) -> None:
        """Fill in the decision."""

    def decide_fallback(self, step: Step) -> None:
        """Fill in the same decision by other means, where this or an earlier stage has failed on this rank."""

    def state_dict(self) -> dict[str, float | None]:
        """Return the history of norms, empty if none is kept. Waits for the device."""

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Continue this history, if one is kept. Raises `SettingsError`."""

    @property
    def tripped(self) -> bool:
        """Whether the budget of skipped steps had run out a few steps ago: the same answer on every rank."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Says what may be done to a step."""

    clip: Clip | None
    skip: bool
    dry_run: bool
    """Nothing is done, and what would have been is counted."""


@dataclass(kw_only=True)
class Stages:
    """Holds what a step goes through before its record."""

    control: OptimizerControl
    measure: Measure
    decide: Decider
    apply: Apply | DryRun
    sums: Sums | None
    """Sums over ranks; None for a single rank, or without local norms."""

    @property
    def rank_sums(self) -> RankSums | None:
        """Sums over the ranks of a model that each holds as a whole."""
        return self.sums if isinstance(self.sums, RankSums) else None


def sharded_stages(
    optimizer: torch.optim.Optimizer, plan: ParameterPlan, arithmetic: Arithmetic, policy: Policy, sums: ShardSums
) -> Stages:
    """Return the stages for a model that `fully_shard` has sharded."""
    control = OptimizerControl(optimizer, arithmetic, plan.parameters)
    measure = ShardedMeasure(plan, optimizer, arithmetic, control, sums)
    return _with_numbers(control, measure, sums, arithmetic, policy)


def replica_stages(
    group: dist.ProcessGroup | None,
    optimizer: torch.optim.Optimizer,
    plan: ParameterPlan,
    arithmetic: Arithmetic,
    policy: Policy,
    kernel: StepKernel | None,
    *,
    local_norms: bool,
    views: bool,
) -> Stages:
    """Return the stages for a model that each rank holds as a whole.

    group: of a DDP model; None for a process that trains alone. kernel: Triton's, which computes in the arithmetic's
    place. views: gradients are views of DDP's buckets.
    """
    device = plan.device()
    summed = group if group is not None and group.size() > 1 and local_norms else None
    single = group is None or group.size() == 1
    control = OptimizerControl(optimizer, arithmetic, plan.parameters)
    options = {"local_norms": local_norms, "single": single, "views": views}
    if kernel is None:
        measure = Measure(plan, optimizer, arithmetic, control, **options)
        rank_sums = None if summed is None else RankSums(summed, device, arithmetic)
        return _with_numbers(control, measure, rank_sums, arithmetic, policy)
    # Imports Triton.
    from foreshock._kernels.decide import KernelDecide
    from foreshock._kernels.stages import KernelApply, KernelDryRun, KernelMeasure, KernelRankSums

    clip = policy.clip
    assert not isinstance(clip, ValueClip)
    sums = None if summed is None else KernelRankSums(summed, device, arithmetic, kernel)
    return Stages(
        control=control,
        measure=KernelMeasure(plan, optimizer, arithmetic, control, kernel=kernel, **options),
        decide=KernelDecide(kernel, arithmetic, control, sums, clip=clip, skip=policy.skip, dry_run=policy.dry_run),
        apply=(KernelDryRun if policy.dry_run else KernelApply)(arithmetic, control, kernel),
        sums=sums,
    )


def _with_numbers(
    control: OptimizerControl, measure: Measure, sums: Sums | None, arithmetic: Arithmetic, policy: Policy
) -> Stages:
    """Return stages whose decisions are made from the numbers of an arithmetic."""
    return Stages(
        control=control,
        measure=measure,
        decide=Decide(arithmetic, measure.plan.device(), clip=policy.clip, skip=policy.skip),
        apply=(DryRun if policy.dry_run else Apply)(arithmetic, control, policy.clip),
        sums=sums,
    )
