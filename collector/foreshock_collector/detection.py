"""Sees a foreshock coming: a streaming rule over a run's steps. Pure: no clock, no I/O; a NaN never blinds it.

The logarithm makes norms additive and their tails tame; an exponentially weighted mean and absolute deviation of it
are the history, fed with clamped values, so that a spike does not hide the next. A lone spike is noted; only a climb,
or spikes in quick succession, add up to a build-up (a one-sided CUSUM with capped steps).

One episode is one build-up. It lasts until the sum has stayed at zero for some steps in a row: a norm that goes on
climbing for a hundred steps is one warning and not twelve.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

EventKind = Literal["spike", "build_up", "loss_spike", "nonfinite", "recovered"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Every constant of the rule, for one quantity."""

    logarithmic: bool = True
    """Judge the logarithm of a positive quantity; else the plain value, in proportion to its mean."""
    alpha: float = 0.97
    """Weight of the past in the running mean: a half-life of 23 steps (ZClip's)."""
    ready_after: int = 25
    """Steps of history before a step is judged (ZClip's)."""
    least_sigma: float = 0.10
    """Floor of the deviation: a calm run must not call a 6 % move six sigma."""
    spike_z: float = 6.0
    """Deviations above the mean that make a spike (OLMo-core's)..."""
    spike_rise: float = math.log(3.0)
    """... if it is also this far above: three times the usual norm."""
    cusum_slack: float = 1.0
    cusum_limit: float = 8.0
    """Sum of (z - slack) that makes a build-up."""
    cusum_cap: float = 6.0
    """Most that z counts in it: a lone spike adds 5 and cannot reach the limit."""
    clamp: float = 3.0
    """Deviations to which values are clamped before they become history."""
    first_deviation: float = 0.25
    """Mean absolute deviation that is assumed of the first value."""
    accept_after: int = 10
    """Spikes in a row after which the new level is accepted..."""
    accept_alpha: float = 0.8
    accept_steps: int = 20
    """... by forgetting faster for this many steps."""
    quiet_steps: int = 10
    """Steps in a row with a sum of zero that end a build-up."""


GRADIENT_RULE = Rule()
LOSS_RULE = Rule(logarithmic=False, least_sigma=0.005, spike_rise=0.1)
"""A loss may be zero or negative and moves little: 0.5 % of it is the least deviation, 10 % the least spike."""
COLLAPSE_AFTER = 10
"""Overflows of a loss scale in a row that are no calibration any more; so is one below a scale of 1."""
RECOVERED_AFTER = 50
"""Finite steps in a row that end a failure."""
_LARGEST = 1e150
"""Values are cut here, so that differences and squares stay finite."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth knowing about one step."""

    kind: EventKind
    attempt: int
    sequence: int
    step: int
    score: float
    """z of a spike, sum of a build-up, number of bad values of a non-finite step, finite steps of a recovery."""
    value: float | None = None
    """Norm or loss of the step."""
    usual: float | None = None
    """What it would have been by history."""


@dataclass
class Channel:
    """State of the rule on one quantity: a few numbers, so it can be stored beside the steps."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0
    total: float = 0.0
    in_build_up: bool = False
    quiet: int = 0
    spikes_in_a_row: int = 0
    accepting: int = 0

    def update(self, value: float, rule: Rule) -> tuple[float | None, float | None]:
        """Take one step's value: (z if it is a spike, sum if a build-up begins here). Bad values change nothing."""
        if not math.isfinite(value) or (rule.logarithmic and value <= 0):
            return None, None
        x = math.log(value) if rule.logarithmic else max(-_LARGEST, min(value, _LARGEST))
        if self.count == 0:
            self.mean, self.deviation, self.count = x, rule.first_deviation * (1 if rule.logarithmic else abs(x)), 1
            return None, None
        scale = 1.0 if rule.logarithmic else abs(self.mean)
        sigma = self._sigma(rule)
        z = (x - self.mean) / sigma
        ready = self.count >= rule.ready_after
        spike = ready and z > rule.spike_z and x - self.mean > rule.spike_rise * scale
        begins = self._add_up(z, rule) if ready else None
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if self.spikes_in_a_row >= rule.accept_after:
            self.accepting, self.spikes_in_a_row = rule.accept_steps, 0
        self._learn(x, sigma, rule, clamped=ready and not self.accepting)
        return (z if spike else None), begins

    def usual(self, rule: Rule) -> float | None:
        """The value that history leads one to expect; None without history."""
        if not self.count:
            return None
        return math.exp(self.mean) if rule.logarithmic else self.mean

    def band(self, rule: Rule) -> tuple[float, float] | None:
        """From where to where values are clamped before they become history; None while no step is judged yet."""
        if self.count < rule.ready_after:
            return None
        reach = rule.clamp * self._sigma(rule)
        low, high = self.mean - reach, self.mean + reach
        return (math.exp(low), math.exp(high)) if rule.logarithmic else (low, high)

    def _sigma(self, rule: Rule) -> float:
        scale = 1.0 if rule.logarithmic else abs(self.mean)
        # 1.2533 = sqrt(pi / 2) turns a mean absolute deviation into a standard deviation.
        return max(1.2533 * self.deviation, rule.least_sigma * scale, 1 / _LARGEST)

    def _add_up(self, z: float, rule: Rule) -> float | None:
        self.total = max(0.0, self.total + min(z, rule.cusum_cap) - rule.cusum_slack)
        if self.total >= rule.cusum_limit:
            begins = None if self.in_build_up else self.total
            self.in_build_up, self.total, self.quiet = True, 0.0, 0
            return begins
        self.quiet = self.quiet + 1 if self.total == 0.0 else 0
        self.in_build_up = self.in_build_up and self.quiet < rule.quiet_steps
        return None

    def _learn(self, x: float, sigma: float, rule: Rule, *, clamped: bool) -> None:
        if clamped:
            x = min(max(x, self.mean - rule.clamp * sigma), self.mean + rule.clamp * sigma)
        alpha = min(rule.alpha, 1 - 1 / (self.count + 1))
        if self.accepting:
            alpha, self.accepting = rule.accept_alpha, self.accepting - 1
        self.deviation = alpha * self.deviation + (1 - alpha) * abs(x - self.mean)
        self.mean = alpha * self.mean + (1 - alpha) * x
        self.count += 1


class Detector:
    """Both channels of one attempt, and whether it is in a failure."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.gradient = Channel(**state.get("gradient", {}))
        self.loss = Channel(**state.get("loss", {}))
        self.failing: bool = state.get("failing", False)
        """From a non-finite step until enough finite ones in a row: one failure is one incident."""
        self.finite_steps: int = state.get("finite_steps", 0)
        self.finite_ever: bool = state.get("finite_ever", False)
        self.overflows: int = state.get("overflows", 0)
        """Of the loss scale, in a row."""
        self.climbing: int = state.get("climbing", 0)
        """Sequence number of the last step that belonged to a build-up; 0: none did."""

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "gradient": asdict(self.gradient),
            "loss": asdict(self.loss),
            "failing": self.failing,
            "finite_steps": self.finite_steps,
            "finite_ever": self.finite_ever,
            "overflows": self.overflows,
            "climbing": self.climbing,
        }

    def update(
        self,
        *,
        attempt: int,
        sequence: int,
        step: int,
        norm: float,
        loss: float | None,
        nonfinite: int = 0,
        overflow: bool = False,
    ) -> list[Event]:
        """One step, in order. nonfinite: how many of loss and gradient, NaN and Inf, are bad.

        overflow: only because of a GradScaler's scale, which is how it finds the right one: a few are no failure.
        Of a failure only the first step is an event.
        """
        events: list[Event] = []

        def note(kind: EventKind, score: float, value: float | None = None, usual: float | None = None) -> None:
            where = {"attempt": attempt, "sequence": sequence, "step": step}
            events.append(Event(kind=kind, score=score, value=value, usual=usual, **where))

        self.overflows = self.overflows + 1 if overflow else 0
        if overflow and self.overflows < COLLAPSE_AFTER:
            return events
        if nonfinite:
            if not self.failing:
                note("nonfinite", float(nonfinite))
            self.failing, self.finite_steps = True, 0
            return events
        self.finite_ever = True
        usual = self.gradient.usual(GRADIENT_RULE)
        spike, begins = self.gradient.update(norm, GRADIENT_RULE)
        if spike is not None:
            note("spike", spike, norm, usual)
        if begins is not None:
            note("build_up", begins, norm, usual)
        if self.gradient.in_build_up:
            self.climbing = sequence
        if loss is not None:
            usual = self.loss.usual(LOSS_RULE)
            spike, _ = self.loss.update(loss, LOSS_RULE)
            if spike is not None:
                note("loss_spike", spike, loss, usual)
        self.finite_steps += 1
        if self.failing and self.finite_steps >= RECOVERED_AFTER:
            self.failing = False
            note("recovered", float(self.finite_steps))
        return events
