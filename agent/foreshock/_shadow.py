"""Shadow mode: policies rule on every step, and nothing is done; what would have been is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock._clip import Clip
from foreshock._policies import Ruling

CLIPPED, SKIPPED = 1.0, 2.0
"""Bits of the column `shadow`."""


class Shadow:
    """Counts, on the device."""

    def __init__(self, clip: Clip | None, device: torch.device) -> None:
        self._clip = clip
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps = 0

    def count(self, ruling: Ruling, gradients: list[Tensor], scale: Tensor | None) -> Tensor:
        """What would have been done, as the column says it: float64 scalar. scale: that the gradients still carry."""
        none = torch.zeros((), dtype=torch.bool, device=self._counts.device)
        clipped = none
        if ruling.divisor is not None:
            clipped = ruling.divisor > 1.0
        elif self._clip is not None and gradients:
            bends = self._clip.bends(gradients, 1.0 if scale is None else scale)
            clipped = none if bends is None else bends
        done = torch.stack((clipped, none if ruling.skip is None else ruling.skip)).to(torch.float64)
        self._counts = self._counts + done
        self._steps += 1
        return CLIPPED * done[0] + SKIPPED * done[1]

    def counts(self) -> dict[str, int]:
        """Waits for the device."""
        clipped, skipped = self._counts.tolist()
        return {"steps": self._steps, "clipped": int(clipped), "skipped": int(skipped)}

    def line(self) -> str:
        """For people."""
        counts = self.counts()
        would = f"{counts['clipped']} would have been clipped and {counts['skipped']} left out"
        return f"shadow: of {counts['steps']} steps {would}"
