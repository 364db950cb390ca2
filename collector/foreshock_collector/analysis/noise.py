"""The gradient noise scale: how many ranks' batches it takes until the gradient is more signal than noise.

A rank's gradient is the true one and noise; the average over W ranks has a W-th of that noise. From the mean square
norm of the local gradients, l2, and the square norm of the averaged one, g2, both parts follow (McCandlish, Kaplan,
Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1, with the rank's batch as the unit):

    signal = (W g2 - l2) / (W - 1)        noise = (l2 - g2) / (1 - 1 / W)        scale = noise / signal

Each is noisy itself, so both are averaged over steps before they are divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.99
"""Weight of the past in both means: a half-life of 69 steps."""
_LARGEST_NORM = 1e100
"""Larger norms say nothing about noise, and would stay in the means forever."""


@dataclass
class NoiseScale:
    """Estimates the noise scale of one attempt."""

    signal: float = 0.0
    noise: float = 0.0
    weight: float = 0.0
    """Share of the means that is data, from 0 to 1; the rest is their initial 0."""
    agreement: float = math.nan
    """g2 / l2 at the newest step where it is known, from 1 / W (all noise) to 1 (the same data on every rank)."""

    def update(self, agreement: float, global_norm: float, world_size: int) -> None:
        """Add a finite step. agreement: g2 / l2; NaN if unknown."""
        if not 0 < agreement < math.inf or world_size < 2 or not 0 < global_norm < _LARGEST_NORM:
            return
        g2 = global_norm**2
        l2 = g2 / agreement
        if not l2 < _LARGEST_NORM**2:
            return
        self.agreement = min(agreement, 1.0)
        self.signal = ALPHA * self.signal + (1 - ALPHA) * (world_size * g2 - l2) / (world_size - 1)
        self.noise = ALPHA * self.noise + (1 - ALPHA) * (l2 - g2) / (1 - 1 / world_size)
        self.weight = ALPHA * self.weight + (1 - ALPHA)

    @property
    def value(self) -> float | None:
        """Noise scale in batches of one rank; None if there is not enough data yet, or no signal in the noise."""
        if self.weight < 0.2 or self.signal <= 0:
            return None
        scale = max(0.0, self.noise / self.signal)
        return scale if math.isfinite(scale) else None
