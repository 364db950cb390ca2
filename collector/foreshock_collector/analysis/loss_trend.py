"""The course of the loss over an attempt: its start, its best, and whether it climbs away from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from foreshock_collector.analysis.rules import FaultRules

FIRST_STEPS = 25
"""Steps from which the initial norm and loss are taken."""
_UNTRAINED_STEPS = 5
"""Steps whose median loss is that of an untrained model: a learning rate has done little by then."""
_ALPHA, _SHORT_ALPHA = 0.9, 0.7
"""Weights of the past in the running mean of the loss and in a short one: half-lives of 7 and 2 steps."""
_LEAST_PART = 0.02
"""Part of the rise above the best by which a step must exceed the short mean to rise further. Eleven steps after a
jump, the short mean is that near to the new level."""
_SETBACK = 3
"""Rising steps that one without a rise takes back: of noise, half of the steps rise, and the count stays near 0."""


@dataclass
class LossTrend:
    """Tracks the initial norm and loss of an attempt, its best loss, and a steady climb away from it."""

    norms: list[float] = field(default_factory=list)
    """Global norms of the first steps."""
    losses: list[float] = field(default_factory=list)
    """Losses of the first steps."""
    loss: float = math.nan
    """Running mean of the loss."""
    best: float = math.inf
    """Lowest value of the running mean so far."""
    short: float = math.nan
    """Mean of the newest losses, about three of them."""
    rising: int = 0
    """Steps by which the loss has risen further, less three for each that did not rise, and never below 0."""

    def __post_init__(self) -> None:
        if math.isnan(self.short):
            # Stored before there was a short mean.
            self.short = self.loss

    @property
    def started(self) -> bool:
        """Whether the start is over, so that there is a best loss."""
        return len(self.losses) == FIRST_STEPS

    def history(self) -> LossTrend:
        """Return a trend with this one's start and best, which does not climb yet."""
        return replace(self, norms=[*self.norms], losses=[*self.losses], rising=0)

    def update(self, norm: float, loss: float | None) -> None:
        """Add a finite step."""
        if len(self.norms) < FIRST_STEPS and norm > 0:
            self.norms.append(norm)
        if loss is None or not math.isfinite(loss):
            return
        if not self.started:
            self.losses.append(loss)
        self._follow(loss)

    def scan_calm(self, losses: Sequence[float], rules: FaultRules) -> bool:
        """Add finite losses if none of them may show a divergence; else change nothing."""
        mean, best, short, rising = self.loss, self.best, self.short, self.rising
        floor, least = 0.1 * abs(median(self.losses or (0.0,))), min(rules.divergence, rules.climb)
        beta, gamma, limit = 1 - _ALPHA, 1 - _SHORT_ALPHA, least * max(abs(best), floor)
        for loss in losses:
            mean += beta * (loss - mean)
            rise = mean - best
            if loss - short > (_LEAST_PART * rise if rise > 0 else 0.0):
                rising += 1
            elif rising:
                rising = rising - _SETBACK if rising > _SETBACK else 0
            short += gamma * (loss - short)
            if rise > limit:
                return False
            if rise < 0:
                best = mean
                limit = least * max(abs(best), floor)
        self.loss, self.best, self.short, self.rising = mean, best, short, rising
        return True

    def rises_above(self, times: float) -> bool:
        """Return whether the loss lies above its best by more than this many times its best."""
        rise = self.loss - self.best
        # The median is the slowest part of it, and seldom needed.
        return math.isfinite(self.best) and rise > times * abs(self.best) and rise > times * self._scale

    def comparable(self, rules: FaultRules) -> bool:
        """Return whether the loss can be compared with its best.

        One that is zero or negative (rewards, log densities) has no scale. One that never fell, and has grown out of
        next to nothing (a penalty, such as GRPO's distance from the reference), is no error that rises.
        """
        fell = self.best < median(self.losses)
        return self.best > 0 and (fell or self.loss <= rules.untrained * median(self.losses[:_UNTRAINED_STEPS]))

    def as_divergence(self) -> str:
        """Return a sentence on a loss that rose above its best."""
        return f"the loss rose from its best, {self.best:.3g}, to {self.loss:.3g} without a build-up of the norm"

    def as_climb(self) -> str:
        """Return a sentence on a loss that rises further and further above its best."""
        return f"the loss climbs steadily, from its best, {self.best:.3g}, to {self.loss:.3g}"

    def as_fading(self, norm: float) -> str:
        """Return a sentence on a norm that has become small while the loss has not."""
        start, loss = norm / median(self.norms), self.loss / median(self.losses)
        return f"relative to the start: norm {start:.1g}, loss {loss:.2g}"

    def as_explosion(self, loss: float, norm: float) -> str:
        """Return a sentence on the first loss and norm, and those of a later step."""
        start = f"{self.losses[0]:.3g} and {self.norms[0]:.3g}"
        return f"loss and norm exploded within the first steps: {start}, then {loss:.3g} and {norm:.3g}"

    @property
    def _scale(self) -> float:
        """The best loss, but not much less than the initial one: a loss near 0 may multiply without harm."""
        return max(abs(self.best), 0.1 * abs(median(self.losses)))

    def _follow(self, loss: float) -> None:
        if math.isnan(self.loss):
            self.loss = self.short = loss
            return
        self.loss += (1 - _ALPHA) * (loss - self.loss)
        if math.isfinite(self.best):
            rises = loss - self.short > _LEAST_PART * max(0.0, self.loss - self.best)
            self.rising = self.rising + 1 if rises else max(0, self.rising - _SETBACK)
        self.short += (1 - _SHORT_ALPHA) * (loss - self.short)
        if self.started:
            self.best = min(self.best, self.loss)
