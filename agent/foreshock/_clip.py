"""Clipping policies: pure arithmetic, where the gradients lie, no read-back.

All treat the symptom of an exploding gradient; docs/runbooks name the causes. Clipping never cures a gradient that
is not finite: such a gradient goes through as it is, and is counted.

A policy answers two questions. `divisor`: what the whole gradient is divided by. `bend`: what becomes of its elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foreshock._errors import SettingsError
from foreshock._norms import gradient_maxima
from foreshock._numbers import Flag, Number, at_least, at_most, finite, ratio, where

EPSILON = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does, so that results agree."""


@dataclass(frozen=True, kw_only=True)
class NormClip:
    """Scale the whole gradient down to `max_norm` where its L2 norm is larger. Keeps its direction."""

    bends_elements: ClassVar[bool] = False
    """Changes elements one by one, each by its own value."""

    max_norm: float
    """Largest L2 norm of the averaged gradient, over all parameters of the optimizer. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("max_norm", self.max_norm)

    def divisor(self, norm: Number, _: Number | None = None) -> Number:
        """What the gradient is divided by: at least 1, and exactly 1 where the norm is not finite. norm: unscaled."""
        return _divisor(norm, self.max_norm)

    def bend(self, gradients: list[Tensor]) -> None:
        """Elements keep their proportions."""

    def bends(self, _: list[Tensor], __: Number = 1.0) -> Flag:
        """Never."""
        return False

    def __str__(self) -> str:
        return f"norm {self.max_norm:g}"


@dataclass(frozen=True, kw_only=True)
class ValueClip:
    """Clamp each element of the gradient to [-clip_value, clip_value]. Bends its direction; prefer `NormClip`.

    Takes a pass over the gradients of its own. There is no one factor to report: the clip coefficient stays 1.
    """

    bends_elements: ClassVar[bool] = True
    """Changes elements one by one, each by its own value."""

    clip_value: float
    """Largest absolute value of an element. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("clip_value", self.clip_value)

    def divisor(self, _: Number, __: Number | None = None) -> None:
        """None: the gradient is not scaled as a whole."""

    def bend(self, gradients: list[Tensor]) -> None:
        """Clamp every element in place, as `torch.nn.utils.clip_grad_value_` does. Unscaled gradients."""
        torch._foreach_clamp_min_(gradients, -self.clip_value)
        torch._foreach_clamp_max_(gradients, self.clip_value)

    def bends(self, gradients: list[Tensor], scale: Number = 1.0) -> Flag:
        """Whether it would change any element of these, one at least. A pass over the gradients of its own.

        scale: that the gradients carry.
        """
        maxima, limit = gradient_maxima(gradients, gradients[0].device), self.clip_value * scale
        return (maxima > limit).any() if isinstance(maxima, Tensor) else any(m > limit for m in maxima)

    def __str__(self) -> str:
        return f"value {self.clip_value:g}"


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Scale the whole gradient down where its norm stands above the run's own history: the mean plus three deviations
    of the norm's logarithm, over the last hundred steps or so. Never above `max_norm`, which alone holds for the first
    25 steps.
    """

    bends_elements: ClassVar[bool] = False
    """Changes elements one by one, each by its own value."""

    max_norm: float | None = None
    """Largest L2 norm whatever history says; positive and finite, or None for no such limit."""

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            _check_positive("max_norm", self.max_norm)

    def divisor(self, norm: Number, ceiling: Number | None = None) -> Number:
        """As `NormClip.divisor`. ceiling: what history allows; Inf before there is any."""
        assert ceiling is not None
        return _divisor(norm, ceiling if self.max_norm is None else at_most(ceiling, self.max_norm))

    def bend(self, gradients: list[Tensor]) -> None:
        """Elements keep their proportions."""

    def bends(self, _: list[Tensor], __: Number = 1.0) -> Flag:
        """Never."""
        return False

    def __str__(self) -> str:
        return "adaptive" if self.max_norm is None else f"adaptive {self.max_norm:g}"


Clip = NormClip | ValueClip | AdaptiveClip


def clip_from(value: float | Clip | None) -> Clip | None:
    """The policy that the argument stands for: a number is a `max_norm`."""
    if value is None or isinstance(value, (NormClip, ValueClip, AdaptiveClip)):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kinds = "a number (a largest norm), NormClip, ValueClip, AdaptiveClip or None"
        raise SettingsError(f"clip: give {kinds}, not {value!r}")
    return NormClip(max_norm=float(value))


def clip_from_text(name: str, text: str) -> Clip | None:
    """The policy that an environment variable stands for: a number is a `max_norm`, "none" is no clipping.

    "adaptive", or "adaptive 1.0" with a `max_norm`.
    """
    kind, _, limit = text.strip().lower().partition(" ")
    try:
        if kind == "none" and not limit:
            return None
        if kind == "adaptive":
            return AdaptiveClip(max_norm=float(limit) if limit else None)
        return NormClip(max_norm=float(text))
    except ValueError:
        forms = "a positive number (a largest norm), adaptive, or none"
        raise SettingsError(f"{name}: must be {forms}, not {text!r}") from None


def _divisor(norm: Number, limit: Number) -> Number:
    return where(finite(norm), at_least(ratio(norm + EPSILON, limit), 1.0), 1.0)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SettingsError(f"clip: {name} must be a positive number, not {value!r}; clip=None only observes")
