"""Shadow mode: policies rule on every step, and nothing is done; what would have been is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock._clip import Clip
from foreshock._numbers import Flag, Number, constant, counted
from foreshock._policies import Ruling

CLIPPED, SKIPPED = 1.0, 2.0
"""Bits of the column `shadow`."""


class Shadow:
    """Counts, and reads none back."""

    def __init__(self, clip: Clip | None, device: torch.device) -> None:
        self._clip = clip
        self._clipped = self._skipped = constant(0.0, device)
        self._steps = 0

    def count(self, ruling: Ruling, gradients: list[Tensor], scale: Number | None) -> Number:
        """What would have been done, as the column says it. scale: that the gradients still carry."""
        clipped: Flag = False
        if ruling.divisor is not None:
            clipped = ruling.divisor > 1.0
        elif self._clip is not None and gradients:
            clipped = self._clip.bends(gradients, 1.0 if scale is None else scale)
        skipped: Flag = False if ruling.skip is None else ruling.skip
        one, other = counted(clipped), counted(skipped)
        self._clipped, self._skipped = self._clipped + one, self._skipped + other
        self._steps += 1
        return CLIPPED * one + SKIPPED * other

    def counts(self) -> dict[str, int]:
        """Waits for the device."""
        return {"steps": self._steps, "clipped": int(self._clipped), "skipped": int(self._skipped)}

    def line(self) -> str:
        """For people."""
        counts = self.counts()
        would = f"{counts['clipped']} would have been clipped and {counts['skipped']} skipped"
        return f"shadow: of {counts['steps']} steps {would}"
