"""Detects events in the steps of an attempt: spikes and build-ups of its norm, spikes of its loss, and failures."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.first_steps import FirstSteps
from foreshock_collector.analysis.rules import DEFAULT, Rules

EventKind = Literal["spike", "build_up", "loss_spike", "nonfinite", "recovered"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event in one step, such as a spike or the first non-finite value."""

    kind: EventKind
    attempt: int
    sequence: int
    step: int
    score: float
    """z of a spike, sum of a build-up, number of bad values of a non-finite step, finite steps of a recovery."""
    value: float | None = None
    """Norm or loss of the step."""
    usual: float | None = None
    """Norm or loss that history led to expect."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Describes the first non-finite step of a failure, and what was known before it."""

    sequence: int
    finite_before: bool
    """Whether the attempt had made a finite step before."""
    climbing: int
    """Sequence number of the last step before that belonged to a build-up; 0 if none did."""


@dataclass(frozen=True, kw_only=True)
class WithheldFailure:
    """Holds a failure that is reported only if no step follows: the script skipped the step, which was not finite."""

    event: Event
    failure: Failure


@dataclass
class Detector:
    """Follows the gradient norm and the loss of one attempt, and whether it is in a failure."""

    gradient: ChannelState = field(default_factory=ChannelState)
    loss: ChannelState = field(default_factory=ChannelState)
    first_steps: FirstSteps = field(default_factory=FirstSteps)
    failing: bool = False
    """Whether a failure lasts: from a non-finite step until enough finite ones in a row."""
    finite_steps: int = 0
    """Finite steps in a row."""
    finite_ever: bool = False
    """Whether the attempt has made a finite step."""
    skips_in_a_row: int = 0
    """Updates in a row that were skipped."""
    withheld: WithheldFailure | None = None
    """Failure at the first of the newest consecutive steps that the script itself skipped because they were not
    finite."""
    climbing: int = 0
    """Sequence number of the last step that belonged to a build-up; 0 if none did."""
    rate: float | None = None
    """Newest known learning rate."""
    changing: int = 0
    """Steps for which another jump of the learning rate belongs to the last one."""

    def update(
        self,
        *,
        attempt: int,
        sequence: int,
        step: int,
        norm: float,
        loss: float | None,
        rate: float = math.nan,
        nonfinite: int = 0,
        skipped: bool = False,
        guarded: bool = False,
        rules: Rules = DEFAULT,
    ) -> list[Event]:
        """Evaluate the next step and return its events. Only the first step of a failure is one.

        norm: NaN if unknown. rate: the learning rate. nonfinite: how many kinds of bad values it has, of NaN and Inf in
        the loss and in the gradient. skipped: the update was skipped, by a GradScaler that looks for its scale, by
        `skip` or by the script; a few of these in a row are no failure. guarded: the script skipped it.
        """
        events: list[Event] = []

        def found_at(kind: EventKind, score: float, value: float | None = None, usual: float | None = None) -> None:
            where = {"attempt": attempt, "sequence": sequence, "step": step}
            events.append(Event(kind=kind, score=score, value=value, usual=usual, **where))

        self._expect(rate, rules)
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        most_skips = rules.collapse_after if self.finite_ever else rules.search_steps
        if skipped and nonfinite and self.skips_in_a_row < most_skips:
            if guarded and self.withheld is None and not self.failing:
                found_at("nonfinite", float(nonfinite))
                self.withheld = WithheldFailure(event=events.pop(), failure=self.failure_at(sequence))
            return events
        self.withheld = None
        if nonfinite:
            if not self.failing:
                found_at("nonfinite", float(nonfinite))
            self.failing, self.finite_steps = True, 0
            return events
        self.finite_ever = True
        for found in self.gradient.scan((norm,), rules.gradient):
            found_at(found.kind, found.score, norm, found.usual)
        if self.first_steps.update(norm, loss, rules.gradient) and not self.gradient.in_build_up:
            self.gradient.in_build_up = True
            found_at("build_up", rules.gradient.cusum_limit, norm, self.first_steps.norm)
        if self.gradient.in_build_up:
            self.climbing = sequence
        for found in self.loss.scan((loss,), rules.loss) if loss is not None else ():
            if found.kind == "spike":
                found_at("loss_spike", found.score, loss, found.usual)
        self.finite_steps += 1
        if self.failing and self.finite_steps >= rules.recovered_after:
            self.failing = False
            found_at("recovered", float(self.finite_steps))
        return events

    def scan_calm(
        self,
        norms: NDArray[np.float64],
        losses: NDArray[np.float64],
        rates: NDArray[np.float64],
        rules: Rules = DEFAULT,
    ) -> int:
        """Do the same as `update` for the finite steps before the first that has an event, only faster.

        norms, losses, rates: of each step, NaN if unknown; there must be no planned change among the steps. Returns how
        many steps these are; 0 while a failure, a build-up or the first steps are followed.
        """
        known_norms, known_losses = np.flatnonzero(~np.isnan(norms)), np.flatnonzero(~np.isnan(losses))
        starting = len(known_norms) and len(known_losses) and not self.first_steps.over(rules.gradient)
        if starting or self.failing or self.gradient.in_build_up:
            return 0
        gradient, loss, steps = copy(self.gradient), copy(self.loss), len(norms)
        if found := gradient.scan(norms[known_norms].tolist(), rules.gradient, stop=True):
            steps = int(known_norms[found[0].place])
            known_losses = known_losses[known_losses < steps]
        if found := loss.scan(losses[known_losses].tolist(), rules.loss, stop=True):
            steps = int(known_losses[found[0].place])
            # The loss has an event before the norm does: the norm may only be followed as far.
            gradient = copy(self.gradient)
            gradient.scan(norms[known_norms[known_norms < steps]].tolist(), rules.gradient)
        if steps:
            self.gradient, self.loss = gradient, loss
            self.finite_ever, self.withheld, self.skips_in_a_row = True, None, 0
            self.finite_steps += steps
            self.changing = max(0, self.changing - steps)
            known_rates = rates[:steps][np.isfinite(rates[:steps]) & (rates[:steps] > 0)]
            self.rate = float(known_rates[-1]) if len(known_rates) else self.rate
        return steps

    def failure_at(self, sequence: int) -> Failure:
        """Return the failure that would begin at this step. Call it before `update` with that step."""
        return Failure(sequence=sequence, finite_before=self.finite_ever, climbing=self.climbing)

    def end(self) -> WithheldFailure | None:
        """Return the withheld failure, now that no step follows."""
        withheld, self.withheld = self.withheld, None
        if withheld is not None:
            self.failing, self.finite_steps = True, 0
        return withheld

    def reset(self) -> None:
        """Drop the history: what follows is another series."""
        self.gradient, self.loss = ChannelState(), ChannelState()

    def resume(self, before: Detector, rules: Rules = DEFAULT) -> None:
        """Take over the history of an attempt that this one continues from a checkpoint."""
        self.gradient, self.loss, self.rate = before.gradient.history(), before.loss.history(), before.rate
        self.first_steps = FirstSteps(count=rules.gradient.ready_after)

    def _expect(self, rate: float, rules: Rules) -> None:
        """Accept a new level of the norm if the learning rate jumps, because that was done on purpose.

        A rate that jumps again right after has run away: the norm has one change to follow, and not one at each step.
        """
        self.changing = max(0, self.changing - 1)
        if not math.isfinite(rate) or rate <= 0:
            return
        if rate == self.rate:
            return
        if self.rate is not None and abs(math.log(rate) - math.log(self.rate)) > math.log(rules.planned_rate_change):
            if not self.changing:
                self.gradient.expect_change(rules.gradient)
            self.changing = rules.gradient.accept_steps
        self.rate = rate
