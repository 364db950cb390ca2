"""Whose step this is: the GradScaler that has called the optimizer."""

from __future__ import annotations

import sys
from types import FrameType

import torch

from foreshock._numbers import Number, number

_STEP = torch.amp.GradScaler.step.__code__
_NEAR = 24
"""Callers further away are not looked at: between the two lie hooks, schedulers and what frameworks put around them."""


def scale_of_caller() -> Number | None:
    """What the loss of this step was multiplied by, if a `GradScaler` is making it; else None.

    The scaler leaves its scale with the optimizer only where a fused kernel is still to divide by it. Where the script
    has called `unscale_`, or the optimizer is not fused, only the scaler knows it, and nothing leads from the optimizer
    to its scaler but the call itself.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_NEAR):
        if frame is None:
            return None
        if frame.f_code is _STEP:
            # One that is not enabled has none.
            scale = getattr(frame.f_locals["self"], "_scale", None)
            return None if scale is None else number(scale)
        frame = frame.f_back
    return None
