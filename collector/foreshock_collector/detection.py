"""Sees a foreshock coming: a streaming rule over a run's steps. Pure: no clock, no I/O; a NaN never blinds it.

The logarithm makes norms additive and their tails tame; an exponentially weighted mean and absolute deviation of it
are the history, fed with clamped values, so that a spike does not hide the next. A lone spike is noted; only a climb,
or spikes in quick succession, add up to a build-up (a one-sided CUSUM with capped steps).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

EventKind = Literal["spike", "build_up", "loss_spike", "nonfinite", "recovered"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Every constant of the rule."""

    alpha: float = 0.97
    """Weight of the past in the running mean: a half-life of 23 steps (ZClip's)."""
    ready_after: int = 25
    """Steps of history before a verdict on a step is given (ZClip's)."""
    least_sigma: float = 0.10
    """Floor of the deviation of ln(norm): a calm run must not call a 6 % move six sigma."""
    spike_z: float = 6.0
    """Deviations above the mean that make a spike (OLMo-core's)..."""
    spike_ratio: float = 3.0
    """... if it is also this many times the mean."""
    cusum_slack: float = 1.0
    cusum_limit: float = 8.0
    """Sum of (z - slack) that makes a build-up."""
    cusum_cap: float = 6.0
    """Most that one step adds: a lone spike adds 5 and cannot reach the limit."""
    clamp: float = 3.0
    """Deviations to which values are clamped before they become history."""
    accept_after: int = 10
    """Spikes in a row after which the new level is accepted..."""
    accept_alpha: float = 0.8
    accept_steps: int = 20
    """... by forgetting faster for this many steps."""
    quiet_steps: int = 10
    """Steps without a spike or a rising sum that end a build-up."""


GRADIENT_RULE = Rule()
LOSS_RULE = Rule(least_sigma=0.05, spike_ratio=1.5)
"""The same machine on ln(loss); losses move less."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth knowing about one step."""

    kind: EventKind
    attempt: int
    step: int
    score: float
    """z of a spike, sum of a build-up, the number of bad values otherwise."""


@dataclass
class Channel:
    """State of the rule on one positive quantity; a few numbers, so it can be stored beside the steps."""

    mean: float = 0.0
    deviation: float = 0.25
    count: int = 0
    total: float = 0.0
    in_build_up: bool = False
    quiet: int = 0
    spikes_in_a_row: int = 0
    accepting: int = 0

    def update(self, value: float, rule: Rule) -> tuple[float | None, float | None]:
        """Take one step's value; (z if it is a spike, sum if a build-up begins here). Bad values change nothing."""
        if not (0.0 < value < math.inf):
            return None, None
        x = math.log(value)
        if self.count == 0:
            self.mean, self.count = x, 1
            return None, None
        sigma = max(1.2533 * self.deviation, rule.least_sigma)  # sqrt(pi/2): mean deviation to standard deviation
        z = (x - self.mean) / sigma
        ready = self.count >= rule.ready_after
        spike = ready and z > rule.spike_z and x - self.mean > math.log(rule.spike_ratio)
        begins = None
        if ready:
            self.total = max(0.0, self.total + min(z, rule.cusum_cap) - rule.cusum_slack)
            if self.total >= rule.cusum_limit:
                # One episode is one build-up: it ends when the sum has stayed low for a while.
                begins = None if self.in_build_up else self.total
                self.in_build_up, self.total, self.quiet = True, 0.0, 0
            elif self.in_build_up:
                self.quiet = self.quiet + 1 if self.total == 0.0 else 0
                self.in_build_up = self.quiet < rule.quiet_steps
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if self.spikes_in_a_row >= rule.accept_after:
            self.accepting, self.spikes_in_a_row = rule.accept_steps, 0
        self._learn(x, sigma, rule, clamped=ready and not self.accepting)
        return (z if spike else None), begins

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
    """Both channels of a run, and whether it is in a failure."""

    RECOVERED_AFTER = 50
    """Finite steps in a row that end a failure."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.gradient = Channel(**state.get("gradient", {}))
        self.loss = Channel(**state.get("loss", {}))
        self.failing: bool = state.get("failing", False)
        self.finite_steps: int = state.get("finite_steps", 0)
        self.finite_ever: bool = state.get("finite_ever", False)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "gradient": asdict(self.gradient),
            "loss": asdict(self.loss),
            "failing": self.failing,
            "finite_steps": self.finite_steps,
            "finite_ever": self.finite_ever,
        }

    def update(self, *, attempt: int, step: int, norm: float, loss: float | None, nonfinite: int) -> list[Event]:
        """One step, in order. nonfinite: how many of loss and gradient, NaN and Inf, are bad."""
        events: list[Event] = []

        def note(kind: EventKind, score: float) -> None:
            events.append(Event(kind=kind, attempt=attempt, step=step, score=score))

        if nonfinite:
            self.failing, self.finite_steps = True, 0
            note("nonfinite", float(nonfinite))
            return events
        self.finite_ever = True
        spike, begins = self.gradient.update(norm, GRADIENT_RULE)
        if spike is not None:
            note("spike", spike)
        if begins is not None:
            note("build_up", begins)
        if loss is not None:
            spike, _ = self.loss.update(loss, LOSS_RULE)
            if spike is not None:
                note("loss_spike", spike)
        self.finite_steps += 1
        if self.failing and self.finite_steps >= self.RECOVERED_AFTER:
            self.failing = False
            note("recovered", float(self.finite_steps))
        return events
