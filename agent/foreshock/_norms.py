"""Norms of many gradients at once, on their device, without a host-device synchronisation.

A norm says three things: finite, and then it is exact to rounding; Inf, an element is infinite and none is NaN; NaN,
an element is NaN. It is never infinite merely because a sum of squares overflowed: stock clipping meets that case
(finite gradients of 1e25 in float32) by multiplying every gradient by zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ZERO, _NONE = torch.zeros((), dtype=torch.float64), torch.full((), -1.0, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class NormSummary:
    """What one step's gradient amounts to. Every field is float64 on the gradients' device."""

    total: Tensor
    """Scalar: L2 norm over all parameters."""
    nan_parameters: Tensor
    """Scalar: parameters with a NaN."""
    inf_parameters: Tensor
    """Scalar: parameters with an Inf and no NaN."""
    first_nonfinite: Tensor
    """Scalar: index of the first parameter, in the order given, that is not finite; -1 if all are."""
    layers: Tensor
    """[layers]: L2 norm of each layer."""
    largest: Tensor | None = None
    """Scalar: largest absolute value of an element, NaN if one is; None: not measured on this step."""

    def unscaled(self, scale: Tensor) -> NormSummary:
        """The same gradient divided by a GradScaler's scale."""
        return NormSummary(
            total=self.total / scale,
            nan_parameters=self.nan_parameters,
            inf_parameters=self.inf_parameters,
            first_nonfinite=self.first_nonfinite,
            layers=self.layers / scale,
            largest=None if self.largest is None else self.largest / scale,
        )


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """L2 norm of each gradient: float64, [n]. Half precision is accumulated in float32, float64 in float64."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    if not gradients[0].is_cpu:
        # Accumulating in float64 costs nothing where memory is the limit, and cannot overflow on narrower gradients.
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    wide = any(g.dtype == torch.float64 for g in gradients)
    dtype = torch.float64 if wide else torch.float32
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).to(torch.float64)
    # An inf-norm costs 25-40 times an L2 norm on a CPU: look closer only when needed.
    if not known_finite(norms.sum()):
        for i in (~norms.isfinite()).nonzero().flatten().tolist():
            norms[i] = _rescaled_norm(gradients[i])
    return norms


def summarize(norms: Tensor, parameters: Tensor, layer_of: Tensor, layers: int) -> NormSummary:
    """Put per-parameter norms together.

    norms: float64, [n]. parameters: int64, [n], index of each norm's parameter. layer_of: int64, [n], its layer.
    """
    by_layer = torch.zeros(layers, dtype=torch.float64, device=norms.device).index_add_(0, layer_of, norms.square())
    total = torch.linalg.vector_norm(norms)
    nan_count, inf_count, first = _faults(norms, parameters, total)
    return NormSummary(
        total=total,
        nan_parameters=nan_count,
        inf_parameters=inf_count,
        first_nonfinite=first,
        layers=by_layer.sqrt(),
    )


def known_finite(value: Tensor) -> bool:
    """A scalar is finite for certain. Looking is free on a CPU; elsewhere it would be a sync, so nothing is certain."""
    return value.is_cpu and math.isfinite(float(value))


def _faults(norms: Tensor, parameters: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many are NaN, how many Inf, and the first of them."""
    if known_finite(total):
        return _ZERO, _ZERO, _NONE
    if not len(norms):
        zero = torch.zeros((), dtype=torch.float64, device=norms.device)
        return zero, zero, zero - 1
    nan, bad = norms.isnan(), ~norms.isfinite()
    nan_count = nan.sum(dtype=torch.float64)
    first = torch.where(bad.any(), parameters.take(bad.to(torch.uint8).argmax()), -1).to(torch.float64)
    return nan_count, bad.sum(dtype=torch.float64) - nan_count, first


def gradient_maxima(gradients: list[Tensor]) -> Tensor:
    """Largest absolute value of each gradient, NaN if an element is: float64, [n], without those that are empty."""
    gradients = [g for g in gradients if g.numel()]
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    if not gradients[0].is_cpu:
        return torch.stack(torch._foreach_norm(gradients, math.inf, dtype=torch.float64))
    return torch.stack([torch.stack(torch.aminmax(g)).to(torch.float64) for g in gradients]).abs().amax(dim=1)


def _rescaled_norm(gradient: Tensor) -> float:
    """The norm of a CPU gradient whose plain norm is not finite: maximum times the norm of the quotient."""
    largest = float(gradient.abs().max())
    if largest in (0.0, float("inf")) or largest != largest:
        return largest
    wide = gradient.to(torch.float64)
    return largest * float(torch.linalg.vector_norm(wide / largest))
