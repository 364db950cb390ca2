"""Detects lasting faults at finite values: duplicate data, outlier ranks, drift, vanishing, divergence, no more loss.

A fault begins once enough steps in a row have shown it, and ends once enough in a row have not, so that one that comes
and goes is reported once. A step counts for neither if it cannot show the fault, because a rank has not reported or
local norms are not measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.analysis.loss_trend import FIRST_STEPS, LossTrend
from foreshock_collector.analysis.rules import DEFAULT, FaultRules
from foreshock_collector.analysis.step_signals import StepSignals
from foreshock_collector.analysis.verdict_table import Cause
from foreshock_collector.records.steps import Step

_LONGER_GAP = 3
"""Multiple of the longest gap before after which a loss is missing: some scripts observe it every so many steps."""
_LEVEL_STEPS = 25
"""Steps after which the running mean of the loss has reached a new level, if there is one."""


class FaultTransition(NamedTuple):
    """The beginning or the end of a lasting fault."""

    cause: Cause
    begins: bool
    sequence: int
    """Sequence number of the first step that showed the fault."""
    step: int
    evidence: tuple[str, ...] = ()
    layer: int = -1
    rank: int = -1
    exploded: bool = False
    """Whether loss and norm exploded in the first steps."""


@dataclass
class Streak:
    """Counts the consecutive steps that show a fault, or do not."""

    shown: int = 0
    missed: int = 0
    on: bool = False
    sequence: int = 0
    """Sequence number of the first step that shows the fault."""
    step: int = 0
    start: float = 0.0
    """The loss early in the streak, to compare with."""

    def count(self, shows: bool, step: Step, *, begins_after: int, ends_after: int) -> bool | None:
        """Count one step. Return True if the fault begins with it, False if it ends, None otherwise."""
        if shows:
            if not self.shown and not self.on:
                self.sequence, self.step = step.sequence, step.step
            self.shown, self.missed = self.shown + 1, 0
        else:
            self.shown, self.missed = 0, self.missed + 1
        if not self.on and self.shown >= begins_after:
            self.on = True
            return True
        if self.on and self.missed >= ends_after:
            self.on = False
            return False
        return None


@dataclass
class FaultDetector:
    """Looks for faults that last in the steps of one attempt."""

    loss_trend: LossTrend = field(default_factory=LossTrend)
    alike_step: int = -1
    """Last step at which all ranks had the same weights; -1 if there was none."""
    losses_known: int = 0
    """Steps with a loss."""
    longest_gap: int = 0
    """Most steps in a row without a loss, between two that had one."""
    streaks: dict[Cause, Streak] = field(default_factory=dict)

    @property
    def diverging(self) -> bool:
        """Whether the loss has been climbing for a long time."""
        return "loss_divergence" in self.streaks and self.streaks["loss_divergence"].on

    def resume(self, before: FaultDetector) -> None:
        """Take over what is known of an attempt that this one continues from a checkpoint."""
        self.loss_trend = before.loss_trend.history()
        self.losses_known, self.longest_gap = before.losses_known, before.longest_gap

    def update(
        self,
        step: Step,
        signals: StepSignals,
        *,
        building_up: bool,
        exploded: bool = False,
        rules: FaultRules = DEFAULT.faults,
    ) -> list[FaultTransition]:
        """Evaluate the next step.

        building_up: the norm is climbing, which explains a climbing loss. exploded: loss and norm exploded in the first
        steps, and the loss is still high.
        """
        missing = self._missing(step, rules)
        if step.nonfinite:
            return [] if missing is None else [missing]
        self.loss_trend.update(step.global_norm, step.loss)
        found = (
            missing,
            self._duplicate(step, signals, rules),
            self._outlying(step, signals, rules),
            self._drifting(step, signals, rules),
            self._vanishing(step, signals, rules),
            self._diverging(step, rules, building_up=building_up, exploded=exploded),
        )
        return [transition for transition in found if transition is not None]

    def scan_calm(
        self, norms: NDArray[np.float64], losses: NDArray[np.float64], rules: FaultRules = DEFAULT.faults
    ) -> bool:
        """Do the same as `update` for finite steps without ranks and layers, only faster, if none of them shows a fault
        and the start is over; else change nothing.

        norms, losses: of each step, NaN if unknown.
        """
        trend, known = self.loss_trend, np.flatnonzero(~np.isnan(losses))
        starting = (len(trend.norms) < FIRST_STEPS and (norms > 0).any()) or (not trend.started and len(known) > 0)
        if starting or any(streak.on for streak in self.streaks.values()):
            return False
        gap = self._longest_gap(known, len(losses), rules)
        if gap is None:
            return False
        can_fade = trend.started and len(trend.norms) == FIRST_STEPS
        if can_fade and (norms < rules.faded * median(trend.norms)).any():
            return False
        if not trend.scan_calm(losses[known].tolist(), rules):
            return False
        if can_fade:
            self._miss("vanishing_gradients", len(norms))
        if len(known):
            self._miss("loss_divergence", len(known))
            self._miss("missing_loss", len(losses))
            self.losses_known += len(known)
            self.longest_gap = max(self.longest_gap, gap)
        return True

    def _miss(self, cause: Cause, steps: int) -> None:
        streak = self.streaks.setdefault(cause, Streak())
        streak.shown, streak.missed = 0, streak.missed + steps

    def _longest_gap(self, known: NDArray[np.int64], steps: int, rules: FaultRules) -> int | None:
        """Return the most steps in a row without a loss; None if they may be a fault, or the last of them is one.

        known: places of the steps that have one, in order.
        """
        if not len(known):
            return None if self.losses_known else 0
        if known[-1] != steps - 1:
            return None
        waited = self.streaks.get("missing_loss", Streak()).shown
        gap = int(np.diff(known, prepend=-1 - waited).max()) - 1
        return gap if gap < max(rules.begins_after, _LONGER_GAP * self.longest_gap) else None

    def _missing(self, step: Step, rules: FaultRules) -> FaultTransition | None:
        """Look for a loss that is no longer observed, for longer than ever before."""
        if not step.stepped:
            return None
        streak = self.streaks.setdefault("missing_loss", Streak())
        if step.loss is not None:
            self.losses_known += 1
            self.longest_gap = max(self.longest_gap, 0 if streak.on else streak.shown)
        # Before there are enough, nobody knows how often the script observes one.
        enough = self.losses_known >= rules.begins_after
        after = max(rules.begins_after, _LONGER_GAP * self.longest_gap) if enough else sys.maxsize
        shows = step.loss is None and self.losses_known > 0
        norm = ", and no gradient norm" if math.isnan(step.global_norm) else ""
        return self._count(
            "missing_loss",
            shows,
            step,
            rules,
            lambda: (f"{self.losses_known} steps before had a loss, and none of the last {after}{norm}",),
            after=after,
            ends_after=1,
        )

    def _duplicate(self, step: Step, signals: StepSignals, rules: FaultRules) -> FaultTransition | None:
        if math.isnan(signals.agreement) or math.isnan(signals.spread):
            return None
        shows = signals.agreement > rules.agreement and signals.spread < rules.spread
        return self._count(
            "duplicate_data",
            shows,
            step,
            rules,
            lambda: (
                f"|mean gradient|^2 is {signals.agreement:.4f} of the mean |local gradient|^2; 1 means the same batch",
                f"the local norms of all ranks are within {max(signals.spread, 1e-7):.1g} of each other",
            ),
        )

    def _outlying(self, step: Step, signals: StepSignals, rules: FaultRules) -> FaultTransition | None:
        if signals.largest_rank < 0:
            return None
        shows = signals.largest_ratio > rules.outlier
        rank = f"the local norm of rank {signals.largest_rank}"
        transition = self._count(
            "outlier_rank",
            shows,
            step,
            rules,
            lambda: (f"{rank} is {signals.largest_ratio:.3g} times the median of the others', steadily",),
        )
        return None if transition is None else transition._replace(rank=signals.largest_rank)

    def _drifting(self, step: Step, signals: StepSignals, rules: FaultRules) -> FaultTransition | None:
        if signals.divergent_ranks is None:
            return None
        evidence = "the weights of all ranks differ in their bits"
        if len(signals.divergent_ranks) == 1:
            evidence = f"the weights of rank {signals.divergent_ranks[0]} differ from the others' in their bits"
        before = self.alike_step
        if not signals.divergent_ranks:
            self.alike_step = step.step
        since = "they have always differed" if before < 0 else f"at step {before} they were the same"
        rank = signals.divergent_ranks[0] if len(signals.divergent_ranks) == 1 else -1
        shows = bool(signals.divergent_ranks)
        transition = self._count("replica_drift", shows, step, rules, lambda: (evidence, since), after=1, ends_after=1)
        return None if transition is None else transition._replace(rank=rank)

    def _vanishing(self, step: Step, signals: StepSignals, rules: FaultRules) -> FaultTransition | None:
        trend = self.loss_trend
        if signals.weakest_layer >= 0 and signals.weakest_ratio < rules.vanished:
            evidence = (
                f"its norm is {signals.weakest_ratio:.1g} of the largest layer's, for {rules.vanishing_steps} steps"
            )
            return self._count(
                "vanishing_gradients",
                True,
                step,
                rules,
                lambda: (evidence,),
                after=rules.vanishing_steps,
                layer=signals.weakest_layer,
            )
        if len(trend.norms) < FIRST_STEPS or not trend.started:
            return None
        start = median(trend.norms)
        shows = step.global_norm < rules.faded * start and trend.loss > rules.unlearned * median(trend.losses) > 0
        return self._count(
            "vanishing_gradients",
            shows,
            step,
            rules,
            lambda: (trend.as_fading(step.global_norm),),
            after=rules.vanishing_steps,
        )

    def _diverging(self, step: Step, rules: FaultRules, *, building_up: bool, exploded: bool) -> FaultTransition | None:
        trend = self.loss_trend
        if step.loss is None or not (trend.started or exploded):
            return None
        streak = self.streaks.setdefault("loss_divergence", Streak())
        # A build-up explains a climbing loss, and alerts already.
        known = (
            not building_up
            and trend.rises_above(min(rules.climb, rules.divergence))
            and (streak.shown > 0 or streak.on or trend.comparable(rules))
        )
        evidence = trend.as_divergence
        if exploded:
            shows, after = True, rules.begins_after
            evidence = partial(trend.as_explosion, step.loss, step.global_norm)
        elif known and (trend.rising >= rules.climb_steps or streak.on) and trend.rises_above(rules.climb):
            shows, after = True, 1
            evidence = trend.as_climb
        else:
            shows, after = known and trend.rises_above(rules.divergence), rules.divergence_steps
            if streak.shown == _LEVEL_STEPS:
                streak.start = trend.loss
            if shows and streak.shown + 1 >= after and not streak.on:
                # A loss that is only high may be at a new level, such as harder data: wait until it climbs further.
                shows = trend.loss > streak.start + rules.divergence_rise * abs(streak.start)
        transition = self._count("loss_divergence", shows, step, rules, lambda: (evidence(),), after=after)
        return None if transition is None else transition._replace(exploded=exploded)

    def _count(
        self,
        cause: Cause,
        shows: bool,
        step: Step,
        rules: FaultRules,
        evidence: Callable[[], tuple[str, ...]],
        *,
        after: int = 0,
        ends_after: int = 0,
        layer: int = -1,
    ) -> FaultTransition | None:
        """Count one step for a fault. evidence: called only if the fault begins, on a step that shows it."""
        streak = self.streaks.setdefault(cause, Streak())
        after, ends_after = after or rules.begins_after, ends_after or rules.ends_after
        begins = streak.count(shows, step, begins_after=after, ends_after=ends_after)
        if begins is None:
            return None
        return FaultTransition(cause, begins, streak.sequence, streak.step, evidence() if begins else (), layer)
