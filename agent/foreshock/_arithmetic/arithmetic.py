"""Where the numbers of a step are computed: on the host for a CPU, on the device otherwise. Chosen once, at attach.

Reading a number back from a GPU would make the host wait, so there each number is a tensor and each operation a small
kernel. On a CPU there is nothing to wait for, and a float costs a hundredth of a kernel. Each rule of clipping and
skipping is written once, with these operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from foreshock._arithmetic.device import DeviceArithmetic
from foreshock._arithmetic.host import HostArithmetic
from foreshock._arithmetic.norms import Flag, Norms, NormSummary, Number
from foreshock._arithmetic.parameters import ParameterLayout

HOSTS = frozenset({"cpu"})
"""Kinds of device whose values the host reads without waiting. Tests remove the CPU to run a GPU's arithmetic."""


class Arithmetic(Protocol):
    """Operations on the numbers of one device.

    Floats behave as float64 tensors do: dividing by zero or leaving the range gives Inf or NaN and raises nothing.
    """

    def constant(self, value: float) -> Number:
        """Return a number that is known before any step."""

    def number(self, tensor: Tensor) -> Number:
        """Return the only element of a tensor of any dtype."""

    def numbers(self, vector: Tensor) -> Sequence[Number]:
        """Return the elements of a float64 vector."""

    def rows(self, matrix: Tensor) -> Sequence[Norms]:
        """Return the rows of a float64 matrix."""

    def vector(self, values: Sequence[Number]) -> Tensor:
        """Return numbers as a float64 tensor, [values]."""

    def row(self, values: Sequence[Number], *layers: Norms) -> Norms:
        """Return numbers, then layer norms, in one row."""

    def zeros(self, count: int) -> Norms:
        """Return that many zeros."""

    def where(self, condition: Flag, yes: Number, no: Number) -> Number:
        """Return one of two numbers."""

    def counted(self, flag: Flag) -> Number:
        """Return 1 or 0."""

    def is_one(self, x: Number) -> bool:
        """Return whether x is known to be 1, without a read-back."""

    def finite(self, x: Number) -> Flag:
        """Return whether x is neither NaN nor Inf."""

    def is_nan(self, x: Number) -> Flag:
        """Return whether x is NaN."""

    def absolute(self, x: Number) -> Number:
        """Return |x|."""

    def at_least(self, x: Number, low: Number) -> Number:
        """Return the larger of two; NaN if x is."""

    def at_most(self, x: Number, high: Number) -> Number:
        """Return the smaller of two; NaN if x is."""

    def ratio(self, x: Number, y: Number) -> Number:
        """Return x / y."""

    def log(self, x: Number) -> Number:
        """Return the natural logarithm: -Inf of zero, NaN of a negative number."""

    def exp(self, x: Number) -> Number:
        """Return e^x: Inf where float64 holds no more."""

    def norms(self, gradients: list[Tensor]) -> Norms:
        """Return the L2 norm of each gradient, [n]. Half precision is accumulated in float32 or wider."""

    def joined(self, parts: list[Norms]) -> Norms:
        """Return the norms of several calls, one after another."""

    def taken(self, norms: Norms, positions: Tensor) -> Norms:
        """Return the norms at these positions, an int64 tensor on the device, [n]."""

    def total(self, norms: Norms) -> Number:
        """Return the L2 norm of all together; NaN if one is."""

    def summarize(self, norms: Norms, layout: ParameterLayout) -> NormSummary:
        """Return the summary of per-parameter norms that are in the layout's order."""

    def unscaled(self, summary: NormSummary, scale: Number | None) -> NormSummary:
        """Return the summary of the same gradient divided by a loss scale, if there is one."""

    def maxima(self, gradients: list[Tensor]) -> Norms:
        """Return the largest absolute value of each gradient that is not empty, NaN if an element is: [n]."""

    def largest(self, maxima: Norms) -> Number:
        """Return the largest of these; NaN if one is."""

    def any_above(self, maxima: Norms, limit: Number) -> Flag:
        """Return whether one of these is above a limit."""


def arithmetic_for(device: torch.device) -> Arithmetic:
    """Return the arithmetic for gradients on this device."""
    return HostArithmetic() if device.type in HOSTS else DeviceArithmetic(device)
