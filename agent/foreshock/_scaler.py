"""Whose step this is: the GradScaler that has called the optimizer."""

from __future__ import annotations

import sys
import weakref
from types import FrameType

import torch

from foreshock._numbers import Number, number

_STEP = torch.amp.GradScaler.step.__code__
_NEAR = 24
"""Callers further away are not looked at: between the two lie hooks, schedulers and what frameworks put around them."""


class Scaler:
    """The script's, once it has made a step."""

    def __init__(self) -> None:
        self._scaler: weakref.ref[torch.amp.GradScaler] | None = None
        self.newest: Number | None = None
        """What the loss of the newest backward pass was multiplied by; None without a scaler, or before its first
        step."""

    def look(self) -> None:
        """A backward pass has ended: after it, the scaler changes its scale."""
        scaler = None if self._scaler is None else self._scaler()
        self.newest = None if scaler is None else _scale(scaler)

    def of_caller(self) -> Number | None:
        """What the loss of this step was multiplied by, if a `GradScaler` is making it; else None.

        The scaler leaves its scale with the optimizer only where a fused kernel is still to divide by it. Where the
        script has called `unscale_`, or the optimizer is not fused, only the scaler knows it, and nothing leads from
        the optimizer to its scaler but the call itself.
        """
        frame: FrameType | None = sys._getframe(1)
        for _ in range(_NEAR):
            if frame is None:
                break
            if frame.f_code is _STEP:
                scaler = frame.f_locals["self"]
                self._scaler = weakref.ref(scaler)
                return _scale(scaler)
            frame = frame.f_back
        self._scaler = None
        return None


def _scale(scaler: torch.amp.GradScaler) -> Number | None:
    # One that is not enabled has none.
    scale = getattr(scaler, "_scale", None)
    return None if scale is None else number(scale)
