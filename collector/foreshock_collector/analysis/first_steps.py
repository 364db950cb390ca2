"""The first steps of an attempt, compared with its very first: an explosion from the start has no history before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock_collector.analysis.rules import ChannelRules

_ALPHA = 0.7
"""Weight of the past in the mean of the newest losses: a single batch may be easy for a network that is dead."""


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
    """Whether the run exploded from its start, and its loss has not come back to the first since."""
    recent_loss: float = 0.0
    """Mean of the newest losses, about three of them, since the explosion."""

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
        if self.exploded or self.over(rule):
            self.recent_loss += (1 - _ALPHA) * (loss - self.recent_loss)
            self.exploded = self.exploded and self.recent_loss > self.loss
            return False
        self.count += 1
        factor = math.exp(rule.spike_rise)
        # A loss that begins at zero or below, such as a reward, has no scale.
        high = loss >= factor * self.loss > 0 and norm >= factor * self.norm
        self.high_in_a_row = self.high_in_a_row + 1 if high else 0
        self.exploded, self.recent_loss = self.high_in_a_row >= rule.surge_steps, loss
        return self.exploded
