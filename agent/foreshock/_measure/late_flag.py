"""Reads a flag that a device computes, some steps later."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock._arithmetic.norms import Number

LAG = 8
"""Steps after which a device has computed a flag, unless steps are so small that waiting costs nothing."""


class LateFlag:
    """Reads a step's flag `LAG` steps later: every rank at the same step, and without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._pinned: Tensor | None = None
        if device.type == "cuda":
            self._pinned = torch.zeros((), dtype=torch.float64, pin_memory=True)
        self._flag: Number = 0.0
        self._arrived: torch.cuda.Event | None = None
        self.due: int | None = None
        """Sequence number of the step that it is to be read at; None if there is no flag."""

    def add(self, sequence: int, flag: Number) -> None:
        """Start to read the flag, 1 or 0, of the step with this sequence number."""
        self._flag, self.due = flag, sequence + LAG
        if self._pinned is not None:
            self._pinned.copy_(flag, non_blocking=True)  # type: ignore[arg-type]
            self._flag, self._arrived = self._pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> bool:
        """Return whether the flag is 1, at the step that it is due at."""
        self.due = None
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
