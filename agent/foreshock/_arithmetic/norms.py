"""What one step's gradient and weights amount to, as numbers.

A norm has three kinds of value. Finite: exact to rounding. Inf: an element is infinite and none is NaN. NaN: an element
is NaN. It is never infinite only because a sum of squares overflowed: stock clipping meets that case (finite gradients
of 1e25 in float32) by multiplying every gradient by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Number = Tensor | float
"""A float64 tensor of no dimensions, or a float."""
Flag = Tensor | bool
"""A bool tensor of no dimensions, or a bool."""
Norms = Tensor | list[float]
"""A number for each of several gradients or layers: a float64 tensor, [n], or floats."""


@dataclass(frozen=True, kw_only=True)
class NormSummary:
    """Sums up the norms of one step's gradient."""

    total: Number
    """L2 norm over all parameters."""
    nan_parameters: Number
    """Parameters with a NaN."""
    inf_parameters: Number
    """Parameters with an Inf and no NaN."""
    first_nonfinite: Number
    """Number of the first parameter that is not finite, in the layout's order; -1 if all are finite."""
    layers: Norms
    """[layers]: L2 norm of each layer."""
    largest: Number | None = None
    """Largest absolute value of an element, NaN if one is; None if not measured on this step."""


@dataclass(frozen=True, kw_only=True)
class WeightSummary:
    """Holds what was measured of the weights before one step."""

    columns: Mapping[str, Number]
    """Columns of the record, by name."""
    layers: Norms | None
    """WEIGHT_BLOCKS one after the other: each [layers], 0 where it was not measured. None: no norms were measured."""
