"""Finds spikes and build-ups of one quantity, such as the gradient norm, by its history, in a few numbers.

Norms are products, so the rules work on their logarithm. History is two exponentially weighted means of it, a slow and
a quick one, and the mean absolute deviation from the quick one. The lower mean is the usual value: a fall is followed
at once, and its slope is little noise. Values are clamped before they enter, so that one spike does not hide the next.
A single spike is an event and no more. A build-up takes a climb or spikes in quick succession: either a one-sided CUSUM
with capped steps crosses its limit, or there is a surge, several steps in a row far above the usual. A surge needs no
deviation, and so detects a run that explodes from its start.

A build-up lasts until the sum has stayed at zero for some steps in a row, so that a norm that climbs for a hundred
steps is one warning and not twelve. The constants are in rules.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from foreshock_collector.analysis.rules import ChannelRules
from foreshock_collector.records.steps import LARGEST, bounded

_LARGEST_LOGARITHM = math.log(sys.float_info.max)
_SIGMA = 1.2533
"""sqrt(pi / 2) turns a mean absolute deviation into a standard deviation."""


class Finding(NamedTuple):
    """An event that a channel detected at one of the values."""

    place: int
    """Index of the value."""
    kind: Literal["spike", "build_up"]
    score: float
    usual: float
    """Value that history led to expect."""


@dataclass
class ChannelState:
    """Follows the history of one quantity in a few numbers, which are stored with the run."""

    mean: float = 0.0
    recent: float = math.inf
    """Mean that forgets faster; Inf without history."""
    deviation: float = 0.0
    """Mean absolute deviation from `recent`."""
    count: int = 0
    total: float = 0.0
    """CUSUM of the high steps."""
    peak: float = 0.0
    """How far the highest step since the sum was zero stood above the usual."""
    in_build_up: bool = False
    quiet: int = 0
    spikes_in_a_row: int = 0
    accepting: int = 0
    high_in_a_row: int = 0
    """Newest steps that rose like a spike, at any deviation."""
    first: list[float] = field(default_factory=list)
    """Values before the rule is ready, in order: their median keeps an explosion from the start from being usual."""

    def __post_init__(self) -> None:
        if self.count and math.isinf(self.recent):
            # Stored before there was a second mean.
            self.recent = self.mean

    def scan(self, values: Sequence[float], rule: ChannelRules, *, stop: bool = False) -> list[Finding]:
        """Add values in order and return the findings. Values that are not finite change nothing, nor do those that are
        not positive, if the rule is logarithmic. stop: end before the first value that has a finding, and return that.

        Calm steps, nearly all of them, stay in this loop, which does the same as `_evaluate`, only faster.
        """
        found: list[Finding] = []
        log, plain, clamp, floor = math.log, not rule.logarithmic, rule.clamp, rule.least_sigma
        beta, gamma, rise, steady_after = 1 - rule.alpha, 1 - rule.recent_alpha, rule.high_rise, rule.steady_after
        mean, recent, deviation, count = self.mean, self.recent, self.deviation, self.count
        calm = self._calm
        for place, value in enumerate(values):
            if calm and count >= steady_after and (plain or value > 0):
                x = value if plain else log(value)
                usual = mean if mean < recent else recent
                scale = abs(usual) if plain else 1.0
                sigma = _SIGMA * deviation
                if sigma < floor * scale:
                    sigma = floor * scale
                off, reach = x - usual, clamp * sigma
                if -reach < off < reach and off < rise * scale:
                    step = x - recent
                    size = step if step > 0 else -step
                    deviation += beta * ((size if size < reach else reach) - deviation)
                    mean += beta * (x - mean)
                    recent += gamma * step
                    count += 1
                    continue
            self.mean, self.recent, self.deviation, self.count = mean, recent, deviation, count
            before = vars(self).copy() if stop else {}
            self._evaluate(place, value, rule, found)
            if stop and found:
                vars(self).update(before)
                return found
            mean, recent, deviation, count = self.mean, self.recent, self.deviation, self.count
            calm = self._calm
        self.mean, self.recent, self.deviation, self.count = mean, recent, deviation, count
        return found

    def expect_change(self, rule: ChannelRules) -> None:
        """Follow a planned change to its new level, and warn only of a surge."""
        self.accepting, self.total, self.peak, self.high_in_a_row = rule.accept_steps, 0.0, 0.0, 0

    def history(self) -> ChannelState:
        """Return a state with this one's history, in which nothing has happened yet."""
        return ChannelState(
            mean=self.mean, recent=self.recent, deviation=self.deviation, count=self.count, first=[*self.first]
        )

    def usual(self, rule: ChannelRules) -> float | None:
        """Return the value that history leads to expect; None without history."""
        if not self.count:
            return None
        return _exp(self._usual) if rule.logarithmic else self._usual

    def band(self, rule: ChannelRules) -> tuple[float, float] | None:
        """Return the range to which values are clamped before they enter the history; None until the rule is ready."""
        if self.count < rule.ready_after:
            return None
        reach = rule.clamp * self._sigma(rule)
        low, high = self._usual - reach, self._usual + reach
        return (_exp(low), _exp(high)) if rule.logarithmic else (low, high)

    @property
    def _usual(self) -> float:
        return min(self.mean, self.recent)

    @property
    def _calm(self) -> bool:
        """Whether a step that is not high would change nothing but the history."""
        return not (self.total or self.in_build_up or self.accepting or self.spikes_in_a_row or self.high_in_a_row)

    def _evaluate(self, place: int, value: float, rule: ChannelRules, found: list[Finding]) -> None:
        if not math.isfinite(value) or (rule.logarithmic and value <= 0):
            return
        x = math.log(value) if rule.logarithmic else bounded(value)
        if self.count == 0:
            self.mean, self.recent, self.count, self.first = x, x, 1, [x]
            self.deviation = rule.first_deviation * (1 if rule.logarithmic else abs(x))
            return
        sigma = self._sigma(rule)
        ready = self.count >= rule.ready_after
        # Under rules that have changed since, the first values may be gone.
        usual = self._usual if ready or not self.first else median(self.first)
        scale = 1.0 if rule.logarithmic else abs(usual)
        off, z = x - usual, (x - self._usual) / sigma
        expected = _exp(usual) if rule.logarithmic else usual
        spike = ready and z > rule.spike_z and off > rule.spike_rise * scale
        if spike:
            found.append(Finding(place, "spike", z, expected))
        score = self._add_up(z, _part(off, scale), rule, use_deviation=ready and not self.accepting)
        if score is not None:
            if not self.in_build_up:
                found.append(Finding(place, "build_up", score, expected))
            self.in_build_up, self.total, self.peak, self.quiet = True, 0.0, 0.0, 0
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if self.spikes_in_a_row >= rule.accept_after:
            self.accepting, self.spikes_in_a_row = rule.accept_steps, 0
        self._learn(x, sigma, rule, clamped=ready and not self.accepting)

    def _sigma(self, rule: ChannelRules) -> float:
        scale = 1.0 if rule.logarithmic else abs(self._usual)
        return max(_SIGMA * self.deviation, rule.least_sigma * scale, 1 / LARGEST)

    def _add_up(self, z: float, off: float, rule: ChannelRules, *, use_deviation: bool) -> float | None:
        """Add a step to the sum; return the sum if it is a build-up now. off: how far the step is above the usual."""
        climbs = off >= rule.steep_rise and (not self.peak or off >= self.peak + rule.climb_rise)
        self.high_in_a_row = self.high_in_a_row + 1 if off >= rule.spike_rise else 0
        if use_deviation:
            self.total = max(
                0.0, self.total + (min(z, rule.cusum_cap) if off >= rule.high_rise else 0) - rule.cusum_slack
            )
            self.quiet = self.quiet + 1 if self.total == 0.0 else 0
            self.peak = max(self.peak, off) if self.total else 0.0
            self.in_build_up = self.in_build_up and self.quiet < rule.quiet_steps
        climbs = climbs and (self.total >= rule.cusum_limit or self.high_in_a_row >= rule.surge_steps)
        lasts = self.total >= rule.lasting_limit and off >= rule.spike_rise
        return max(self.total, rule.cusum_limit) if climbs or lasts else None

    def _learn(self, x: float, sigma: float, rule: ChannelRules, *, clamped: bool) -> None:
        reach = rule.clamp * sigma if clamped else math.inf
        x = min(max(x, self._usual - reach), self._usual + reach)
        even = 1 - 1 / (self.count + 1)
        alpha, recent_alpha = min(rule.alpha, even), min(rule.recent_alpha, even)
        if self.accepting:
            alpha, recent_alpha = rule.accept_alpha, min(rule.accept_alpha, rule.recent_alpha)
            self.accepting -= 1
        self.deviation = alpha * self.deviation + (1 - alpha) * min(abs(x - self.recent), reach)
        self.mean = alpha * self.mean + (1 - alpha) * x
        self.recent = recent_alpha * self.recent + (1 - recent_alpha) * x
        self.count += 1
        self.first = [*self.first, x] if self.count < rule.ready_after else []


def _part(off: float, scale: float) -> float:
    """Return off / scale, bounded so that it stays finite however small the scale is; 0 if the scale is 0."""
    return off / scale if abs(off) < LARGEST * scale else math.copysign(LARGEST, off) if scale else 0.0


def _exp(x: float) -> float:
    return math.exp(min(x, _LARGEST_LOGARITHM))
