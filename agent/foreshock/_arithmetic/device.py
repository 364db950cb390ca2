"""Arithmetic of a step on the device: the numbers are float64 tensors of no dimensions, and none is read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foreshock._arithmetic.norms import NormSummary
from foreshock._arithmetic.parameters import ParameterLayout
from foreshock._torch import foreach_norm

Value = Any
"""A tensor, or a float constant beside one."""


class DeviceArithmetic:
    """Computes with small kernels. `Arithmetic` describes each method."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def constant(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def number(self, tensor: Tensor) -> Tensor:
        # A loss may lie elsewhere, and kernels can read it on this device only.
        return tensor.detach().to(self._device, torch.float64, non_blocking=True).reshape(())

    def numbers(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.to(torch.float64).unbind()

    def rows(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return matrix.unbind()

    def vector(self, values: Sequence[Value]) -> Tensor:
        return torch.stack(list(values)).to(torch.float64)

    def row(self, values: Sequence[Value], *layers: Value) -> Tensor:
        return torch.cat((self.vector(values), *layers))

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self._device)

    def where(self, condition: Value, yes: Value, no: Value) -> Tensor:
        return torch.where(condition, yes, no)

    def counted(self, flag: Value) -> Tensor:
        counted: Tensor = flag.to(torch.float64)
        return counted

    def is_one(self, _: Value) -> bool:
        return False

    def finite(self, x: Value) -> Tensor:
        return torch.isfinite(x)

    def is_nan(self, x: Value) -> Tensor:
        return torch.isnan(x)

    def absolute(self, x: Value) -> Tensor:
        return torch.abs(x)

    def at_least(self, x: Value, low: Value) -> Tensor:
        return torch.clamp(x, min=low)

    def at_most(self, x: Value, high: Value) -> Tensor:
        return torch.clamp(x, max=high)

    def ratio(self, x: Value, y: Value) -> Value:
        return x / y

    def log(self, x: Value) -> Tensor:
        return torch.log(x)

    def exp(self, x: Value) -> Tensor:
        return torch.exp(x)

    def norms(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return self.zeros(0)
        # Accumulating in float64 costs nothing where memory is the limit, and cannot overflow on narrower gradients.
        return torch.stack(foreach_norm(gradients, 2, dtype=torch.float64))

    def joined(self, parts: list[Value]) -> Tensor:
        return torch.cat(parts) if parts else self.zeros(0)

    def taken(self, norms: Value, positions: Tensor) -> Tensor:
        taken: Tensor = norms[positions]
        return taken

    def total(self, norms: Value) -> Tensor:
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def summarize(self, norms: Value, layout: ParameterLayout) -> NormSummary:
        squares = self.zeros(layout.layers)
        total = self.total(norms)
        if not len(norms):
            return NormSummary(
                total=total, nan_parameters=total, inf_parameters=total, first_nonfinite=total - 1, layers=squares
            )
        nan, bad = norms.isnan(), ~norms.isfinite()
        nan_count = nan.sum(dtype=torch.float64)
        first = torch.where(bad.any(), layout.numbers_on_device.take(bad.to(torch.uint8).argmax()), -1)
        return NormSummary(
            total=total,
            nan_parameters=nan_count,
            inf_parameters=bad.sum(dtype=torch.float64) - nan_count,
            first_nonfinite=first.to(torch.float64),
            layers=squares.index_add_(0, layout.layer_of_on_device, norms.square()).sqrt(),
        )

    def unscaled(self, summary: NormSummary, scale: Value) -> NormSummary:
        if scale is None:
            return summary
        return replace(
            summary,
            total=summary.total / scale,
            layers=summary.layers / scale,
            largest=None if summary.largest is None else summary.largest / scale,
        )

    def maxima(self, gradients: list[Tensor]) -> Tensor:
        gradients = [g for g in gradients if g.numel()]
        return torch.stack(foreach_norm(gradients, math.inf, dtype=torch.float64)) if gradients else self.zeros(0)

    def largest(self, maxima: Value) -> Tensor:
        largest: Tensor = maxima.max()
        return largest

    def any_above(self, maxima: Value, limit: Value) -> Tensor:
        above: Tensor = (maxima > limit).any()
        return above
