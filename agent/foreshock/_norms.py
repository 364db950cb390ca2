"""Norms of many gradients at once, where they lie, without a host-device synchronisation.

A norm says three things: finite, and then it is exact to rounding; Inf, an element is infinite and none is NaN; NaN,
an element is NaN. It is never infinite merely because a sum of squares overflowed: stock clipping meets that case
(finite gradients of 1e25 in float32) by multiplying every gradient by zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foreshock._numbers import Number, finite, on_host, ratio

Norms = Tensor | list[float]
"""A number for each of several gradients or layers: float64, [n], on their device; floats if that is a CPU."""


@dataclass(frozen=True, kw_only=True)
class NormSummary:
    """What one step's gradient amounts to."""

    total: Number
    """L2 norm over all parameters."""
    nan_parameters: Number
    """Parameters with a NaN."""
    inf_parameters: Number
    """Parameters with an Inf and no NaN."""
    first_nonfinite: Number
    """Number of the first parameter, in the order given, that is not finite; -1 if all are."""
    layers: Norms
    """[layers]: L2 norm of each layer."""
    largest: Number | None = None
    """Largest absolute value of an element, NaN if one is; None: not measured on this step."""

    def unscaled(self, scale: Number) -> NormSummary:
        """The same gradient divided by a GradScaler's scale."""
        layers = self.layers
        return replace(
            self,
            total=ratio(self.total, scale),
            layers=layers / scale if isinstance(layers, Tensor) else [float(ratio(norm, scale)) for norm in layers],
            largest=None if self.largest is None else ratio(self.largest, scale),
        )


class Places:
    """Which parameter, and which layer, each of several norms is of."""

    def __init__(
        self,
        parameters: tuple[int, ...],
        layer_of: Sequence[int],
        layers: int,
        device: torch.device,
        numbers: Sequence[int],
    ) -> None:
        """parameters: index of each. layer_of: each index's layer, of `layers`. device: of the gradients. numbers: what
        the collector calls each index.
        """
        self.parameters = parameters
        self.layer_of = [layer_of[i] for i in parameters]
        self.layers = layers
        self.device = device
        self.numbers = [numbers[i] for i in parameters]
        self.numbers_there = torch.tensor(self.numbers, dtype=torch.int64, device=device)
        self.layer_of_there = torch.tensor(self.layer_of, dtype=torch.int64, device=device)


def gradient_norms(gradients: list[Tensor], device: torch.device) -> Norms:
    """L2 norm of each gradient, [n]. Half precision is accumulated in float32, float64 in float64."""
    if not on_host(device):
        if not gradients:
            return torch.zeros(0, dtype=torch.float64, device=device)
        # Accumulating in float64 costs nothing where memory is the limit, and cannot overflow on narrower gradients.
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    if not gradients:
        return []
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    norms = [norm.item() for norm in torch._foreach_norm(gradients, 2, dtype=dtype)]
    # An inf-norm costs 25-40 times an L2 norm on a CPU: look closer only when needed.
    if not math.isfinite(sum(norms)):
        norms = [n if math.isfinite(n) else _rescaled_norm(g) for n, g in zip(norms, gradients, strict=True)]
    return norms


def summarize(norms: Norms, places: Places) -> NormSummary:
    """Put per-parameter norms together. places: of these norms, in their order."""
    if isinstance(norms, Tensor):
        return _summarized_there(norms, places)
    squares = [0.0] * places.layers
    for layer, norm in zip(places.layer_of, norms, strict=True):
        squares[layer] += norm * norm
    total, nan, inf, first = overall(norms), 0, 0, -1
    if not finite(total):
        nan, inf = sum(map(math.isnan, norms)), sum(map(math.isinf, norms))
        bad = (i for i, norm in zip(places.numbers, norms, strict=True) if not math.isfinite(norm))
        first = next(bad, -1)
    return NormSummary(
        total=total,
        nan_parameters=float(nan),
        inf_parameters=float(inf),
        first_nonfinite=float(first),
        layers=[math.sqrt(square) for square in squares],
    )


def _summarized_there(norms: Tensor, places: Places) -> NormSummary:
    squares = torch.zeros(places.layers, dtype=torch.float64, device=norms.device)
    total = overall(norms)
    if not len(norms):
        return NormSummary(
            total=total, nan_parameters=total, inf_parameters=total, first_nonfinite=total - 1, layers=squares
        )
    nan, bad = norms.isnan(), ~norms.isfinite()
    nan_count = nan.sum(dtype=torch.float64)
    first = torch.where(bad.any(), places.numbers_there.take(bad.to(torch.uint8).argmax()), -1)
    return NormSummary(
        total=total,
        nan_parameters=nan_count,
        inf_parameters=bad.sum(dtype=torch.float64) - nan_count,
        first_nonfinite=first.to(torch.float64),
        layers=squares.index_add_(0, places.layer_of_there, norms.square()).sqrt(),
    )


def overall(norms: Norms) -> Number:
    """L2 norm of all together; NaN if one is."""
    if isinstance(norms, Tensor):
        there: Tensor = torch.linalg.vector_norm(norms)
        return there
    total = math.hypot(*norms)
    # hypot says Inf where one is Inf, whatever the others are.
    return math.nan if total == math.inf and any(map(math.isnan, norms)) else total


def gradient_maxima(gradients: list[Tensor], device: torch.device) -> Norms:
    """Largest absolute value of each gradient, NaN if an element is: [n], without those that are empty."""
    gradients = [g for g in gradients if g.numel()]
    if not on_host(device):
        if not gradients:
            return torch.zeros(0, dtype=torch.float64, device=device)
        return torch.stack(torch._foreach_norm(gradients, math.inf, dtype=torch.float64))
    return [float(torch.stack(torch.aminmax(g)).abs().amax()) for g in gradients]


def largest_of(maxima: Norms) -> Number:
    """The largest; NaN if one is."""
    if isinstance(maxima, Tensor):
        largest: Tensor = maxima.max()
        return largest
    return math.nan if any(map(math.isnan, maxima)) else max(maxima, default=0.0)


def _rescaled_norm(gradient: Tensor) -> float:
    """The norm of a CPU gradient whose plain norm is not finite: maximum times the norm of the quotient."""
    largest = float(gradient.abs().max())
    if largest in (0.0, float("inf")) or largest != largest:
        return largest
    wide = gradient.to(torch.float64)
    return largest * float(torch.linalg.vector_norm(wide / largest))
