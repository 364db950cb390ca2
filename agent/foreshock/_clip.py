"""Clipping policies: pure arithmetic on the device, no read-back.

Both treat the symptom of an exploding gradient; docs/runbooks name the causes. Clipping never cures a gradient that
is not finite: such a gradient goes through as it is, and is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock._errors import SettingsError

EPSILON = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does, so that results agree."""


@dataclass(frozen=True, kw_only=True)
class NormClip:
    """Scale the whole gradient down to `max_norm` where its L2 norm is larger. Keeps its direction."""

    max_norm: float
    """Largest L2 norm of the averaged gradient, over all parameters of the optimizer. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("max_norm", self.max_norm)

    def divisor(self, norm: Tensor) -> Tensor:
        """What the gradient is divided by: at least 1, and exactly 1 where the norm is not finite.

        norm: float64, scalar, unscaled. Returns float64, scalar, on the same device.
        """
        divisor = ((norm + EPSILON) / self.max_norm).clamp(min=1.0)
        return torch.where(norm.isfinite(), divisor, 1.0)

    def __str__(self) -> str:
        return f"norm {self.max_norm:g}"


@dataclass(frozen=True, kw_only=True)
class ValueClip:
    """Clamp each element of the gradient to [-clip_value, clip_value]. Bends its direction; prefer `NormClip`.

    Takes a pass over the gradients of its own. There is no one factor to report: the clip coefficient stays 1.
    """

    clip_value: float
    """Largest absolute value of an element. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("clip_value", self.clip_value)

    def __str__(self) -> str:
        return f"value {self.clip_value:g}"


Clip = NormClip | ValueClip


def clip_from(value: float | NormClip | ValueClip | None) -> Clip | None:
    """The policy that the argument stands for: a number is a `max_norm`."""
    if value is None or isinstance(value, (NormClip, ValueClip)):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"clip: give a number (a largest norm), NormClip, ValueClip or None, not {value!r}")
    return NormClip(max_norm=float(value))


def clip_from_text(name: str, text: str) -> Clip | None:
    """The policy that an environment variable stands for: a number is a `max_norm`, "none" is no clipping."""
    if text.strip().lower() == "none":
        return None
    try:
        return NormClip(max_norm=float(text))
    except ValueError:
        raise SettingsError(f"{name}: must be a positive number (a largest norm) or none, not {text!r}") from None


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SettingsError(f"clip: {name} must be a positive number, not {value!r}; clip=None only observes")
