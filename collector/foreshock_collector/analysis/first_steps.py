"""The first steps of an attempt, compared with its very first: an explosion from the start has no history before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock_collector.analysis.rules import ChannelRules


@dataclass
class FirstSteps:
    """Holds norm and loss of the first step, and whether both have exploded since.

    The first loss is that of an untrained model: one that knows nothing guesses no worse. If the norm multiplies as
    well, updates have destroyed the weights, though all values may stay finite for good.
    """

    norm: float = 0.0
    loss: float = 0.0
    count: int = 0
    """Steps that were compared."""
    high_in_a_row: int = 0
    exploded: bool = False
    """Whether the run exploded from its start, and its loss has not come back since."""

    def over(self, rule: ChannelRules) -> bool:
        """Return whether further steps change nothing."""
        return self.count >= rule.ready_after and not self.exploded

    def update(self, norm: float, loss: float | None, rule: ChannelRules) -> bool:
        """Add a finite step. Return True if the explosion is certain from this step on.

        norm: NaN if unknown. rule: for the norm; a loss must rise as high and for as long.
        """
        if loss is None or not norm > 0:
            return False
        if not self.count:
            self.norm, self.loss, self.count = norm, loss, 1
            return False
        factor = math.exp(rule.spike_rise)
        # One that begins at zero or below, such as a reward, has no scale.
        high = loss >= factor * self.loss > 0
        if self.exploded or self.over(rule):
            self.exploded = self.exploded and high
            return False
        self.count += 1
        self.high_in_a_row = self.high_in_a_row + 1 if high and norm >= factor * self.norm else 0
        self.exploded = self.high_in_a_row >= rule.surge_steps
        return self.exploded
