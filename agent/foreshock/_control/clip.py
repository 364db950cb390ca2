"""Clipping policies: pure arithmetic on the gradients' own device, without a read-back.

All treat the symptom of an exploding gradient; docs/runbooks name the causes. Clipping never repairs a gradient that is
not finite: such a gradient passes unchanged and is counted.

A policy has two parts: `divisor`, by which the whole gradient is divided, and `clamp_`, which changes single elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number
from foreshock._errors import SettingsError
from foreshock._torch import foreach_clamp_max_, foreach_clamp_min_

EPSILON = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does, so that results agree."""


@dataclass(frozen=True, kw_only=True)
class NormClip:
    """Scale the whole gradient down to `max_norm` where its L2 norm is larger. Keeps its direction."""

    max_norm: float
    """Largest L2 norm of the averaged gradient, over all parameters of the optimizer. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("max_norm", self.max_norm)

    def divisor(self, arithmetic: Arithmetic, norm: Number, _: Number | None = None) -> Number:
        """Return what divides the gradient: at least 1, exactly 1 where the norm is not finite. norm: unscaled."""
        return _divisor(arithmetic, norm, (norm + EPSILON) / self.max_norm)

    def __str__(self) -> str:
        return f"norm {self.max_norm:g}"


@dataclass(frozen=True, kw_only=True)
class ValueClip:
    """Clamp each element of the gradient to [-clip_value, clip_value]. Changes its direction; prefer `NormClip`.

    Needs a separate pass over the gradients. No single factor describes it: the clip coefficient stays 1.
    """

    clip_value: float
    """Largest absolute value of an element. Positive and finite."""

    def __post_init__(self) -> None:
        _check_positive("clip_value", self.clip_value)

    def divisor(self, _: Arithmetic, __: Number, ___: Number | None = None) -> None:
        """Return None: the gradient is not scaled as a whole."""

    def clamp_(self, gradients: list[Tensor]) -> None:
        """Clamp every element in place, as `torch.nn.utils.clip_grad_value_` does. gradients: unscaled."""
        foreach_clamp_min_(gradients, -self.clip_value)
        foreach_clamp_max_(gradients, self.clip_value)

    def would_clamp(self, arithmetic: Arithmetic, gradients: list[Tensor], scale: Number = 1.0) -> Flag:
        """Return whether it would change an element. Needs a pass over the gradients.

        scale: of the loss, which the gradients still contain.
        """
        return arithmetic.any_above(arithmetic.maxima(gradients), self.clip_value * scale)

    def __str__(self) -> str:
        return f"value {self.clip_value:g}"


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Scale the whole gradient down where its norm exceeds the run's own history: the mean plus three deviations of the
    norm's logarithm, over about the last hundred steps. Never above `max_norm`, the only limit for the first 25 steps.
    """

    max_norm: float | None = None
    """Largest L2 norm whatever the history; positive and finite, or None for no such limit."""

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            _check_positive("max_norm", self.max_norm)

    def divisor(self, arithmetic: Arithmetic, norm: Number, ceiling: Number | None = None) -> Number:
        """Return what divides the gradient, as `NormClip.divisor`. ceiling: the history's; Inf before there is any."""
        assert ceiling is not None
        limit = ceiling if self.max_norm is None else arithmetic.at_most(ceiling, self.max_norm)
        # The ceiling of norms near zero may be zero.
        return _divisor(arithmetic, norm, arithmetic.ratio(norm + EPSILON, limit))

    def __str__(self) -> str:
        return "adaptive" if self.max_norm is None else f"adaptive {self.max_norm:g}"


Clip = NormClip | ValueClip | AdaptiveClip


def clip_from(value: float | Clip | None) -> Clip | None:
    """Return the policy of attach's argument: a number is a `max_norm`."""
    if value is None or isinstance(value, (NormClip, ValueClip, AdaptiveClip)):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kinds = "a number (a largest norm), NormClip, ValueClip, AdaptiveClip or None"
        raise SettingsError(f"clip: give {kinds}, not {value!r}")
    return NormClip(max_norm=float(value))


def clip_from_text(name: str, text: str) -> Clip | None:
    """Return the policy of an environment variable: a number is a `max_norm`, "none" is no clipping.

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


def _divisor(arithmetic: Arithmetic, norm: Number, ratio: Number) -> Number:
    return arithmetic.where(arithmetic.finite(norm), arithmetic.at_least(ratio, 1.0), 1.0)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SettingsError(f"clip: {name} must be a positive number, not {value!r}; clip=None only observes")
