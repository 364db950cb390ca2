"""Arithmetic of a step on the host: the numbers are floats. For gradients on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreshock._arithmetic.norms import Flag, Norms, NormSummary, Number
from foreshock._arithmetic.parameters import ParameterLayout
from foreshock._torch import foreach_norm


class HostArithmetic:
    """Computes with floats. `Arithmetic` describes each method."""

    constant = staticmethod(float)
    counted = staticmethod(float)
    finite = staticmethod(math.isfinite)
    is_nan = staticmethod(math.isnan)
    number: Callable[[Tensor], float] = staticmethod(Tensor.item)
    numbers = rows = staticmethod(Tensor.tolist)
    is_one: Callable[[Number], bool] = staticmethod((1.0).__eq__)

    def vector(self, values: Sequence[Number]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def row(self, values: Sequence[Number], *layers: Norms) -> list[float]:
        row = [*map(float, values)]
        for norms in layers:
            row += norms
        return row

    def zeros(self, count: int) -> list[float]:
        return [0.0] * count

    def where(self, condition: Flag, yes: Number, no: Number) -> Number:
        return yes if condition else no

    def absolute(self, x: Number) -> Number:
        return x if x >= 0 else -x

    def at_least(self, x: Number, low: Number) -> Number:
        return low if x < low else x

    def at_most(self, x: Number, high: Number) -> Number:
        return high if x > high else x

    def ratio(self, x: Number, y: Number) -> Number:
        if y != 0:
            return x / y
        return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)

    def log(self, x: Number) -> float:
        return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan

    def exp(self, x: Number) -> float:
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf

    def norms(self, gradients: list[Tensor]) -> list[float]:
        if not gradients:
            return []
        dtype = torch.float32
        for gradient in gradients:
            if gradient.dtype == torch.float64:
                dtype = torch.float64
        # One read for all: an item() for each norm costs as much as the norm of a small gradient.
        norms: list[float] = torch.stack(foreach_norm(gradients, 2, dtype=dtype)).tolist()
        # An inf-norm costs 25 to 40 times an L2 norm on a CPU: look closer only when needed.
        if not math.isfinite(sum(norms)):
            norms = [n if math.isfinite(n) else _rescaled_norm(g) for n, g in zip(norms, gradients, strict=True)]
        return norms

    def joined(self, parts: list[Norms]) -> list[float]:
        return [float(norm) for part in parts for norm in part]

    def taken(self, norms: Norms, positions: Tensor) -> list[float]:
        return [float(norms[position]) for position in positions.tolist()]

    def total(self, norms: Norms) -> float:
        total = math.hypot(*norms)
        # hypot is Inf where one is Inf, even beside a NaN.
        return math.nan if total == math.inf and any(map(math.isnan, norms)) else total

    def summarize(self, norms: Norms, layout: ParameterLayout) -> NormSummary:
        squares = [0.0] * layout.layers
        for layer, norm in zip(layout.layer_of, norms, strict=True):
            squares[layer] += float(norm * norm)
        total, nan, inf, first = math.hypot(*norms), 0, 0, -1
        if not math.isfinite(total):
            total = self.total(norms)
            nan, inf = sum(map(math.isnan, norms)), sum(map(math.isinf, norms))
            bad = (i for i, norm in zip(layout.numbers, norms, strict=True) if not math.isfinite(norm))
            first = next(bad, -1)
        return NormSummary(
            total=total,
            nan_parameters=float(nan),
            inf_parameters=float(inf),
            first_nonfinite=float(first),
            layers=list(map(math.sqrt, squares)),
        )

    def unscaled(self, summary: NormSummary, scale: Number | None) -> NormSummary:
        if scale is None:
            return summary
        return replace(
            summary,
            total=self.ratio(summary.total, scale),
            layers=[float(self.ratio(norm, scale)) for norm in summary.layers],
            largest=None if summary.largest is None else self.ratio(summary.largest, scale),
        )

    def maxima(self, gradients: list[Tensor]) -> list[float]:
        return [float(torch.stack(torch.aminmax(g)).abs().amax()) for g in gradients if g.numel()]

    def largest(self, maxima: Norms) -> float:
        return math.nan if any(map(math.isnan, maxima)) else float(max(maxima, default=0.0))

    def any_above(self, maxima: Norms, limit: Number) -> bool:
        return any(maximum > limit for maximum in maxima)


def _rescaled_norm(gradient: Tensor) -> float:
    """Return the norm of a gradient whose plain norm is not finite: its maximum times the norm of the quotient."""
    largest = float(gradient.abs().max())
    if largest in (0.0, math.inf) or math.isnan(largest):
        return largest
    wide = gradient.to(torch.float64)
    return largest * float(torch.linalg.vector_norm(wide / largest))
