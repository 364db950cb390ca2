"""The numbers that follow from a gradient: where they are computed, and what Python's operators lack for them.

On a GPU a number is a float64 tensor of no dimensions and every operation a small kernel, since reading one back would
make the host wait for the device. On a CPU there is nothing to wait for, and there a number is a float: that costs a
hundredth of a kernel. Each rule is written once and takes both.

Floats behave here as float64 tensors do: dividing by zero or leaving the range gives Inf or NaN, and raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Number = Tensor | float
"""A float64 tensor of no dimensions, or a float."""
Flag = Tensor | bool
"""A bool tensor of no dimensions, or a bool."""


HOSTS = frozenset({"cpu"})
"""Kinds of device whose values the host reads without waiting. Tests take the CPU out, to have a GPU's arithmetic."""


def on_host(device: torch.device) -> bool:
    """Numbers of tensors on this device are floats."""
    return device.type in HOSTS


def constant(value: float, device: torch.device) -> Number:
    """A number that is known before any step."""
    return value if on_host(device) else torch.full((), value, dtype=torch.float64, device=device)


def number(tensor: Tensor) -> Number:
    """The only element of a tensor, of any dtype."""
    if on_host(tensor.device):
        return float(tensor.item())
    return tensor.detach().to(torch.float64).reshape(())


def numbers(vector: Tensor) -> Sequence[Number]:
    """The elements of a vector."""
    if on_host(vector.device):
        return [float(value) for value in vector.tolist()]
    return vector.to(torch.float64).unbind()


def vector(values: Sequence[Number], device: torch.device) -> Tensor:
    """Numbers in a row: float64, [values], on the device."""
    if on_host(device):
        return torch.tensor(values, dtype=torch.float64, device=device)
    there = [v if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values]
    return torch.stack(there).to(torch.float64)


def where(condition: Flag, yes: Number, no: Number) -> Number:
    """One of two numbers."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def counted(flag: Flag) -> Number:
    """1 or 0."""
    return flag.to(torch.float64) if isinstance(flag, Tensor) else float(flag)


def finite(x: Number) -> Flag:
    """Neither NaN nor Inf."""
    return x.isfinite() if isinstance(x, Tensor) else math.isfinite(x)


def is_nan(x: Number) -> Flag:
    """Not a number."""
    return x.isnan() if isinstance(x, Tensor) else math.isnan(x)


def absolute(x: Number) -> Number:
    """|x|."""
    return x.abs() if isinstance(x, Tensor) else abs(x)


def at_least(x: Number, low: Number) -> Number:
    """The larger of two; NaN if x is."""
    if isinstance(x, Tensor):
        return x.clamp(min=low)
    return low if x < low else x


def at_most(x: Number, high: Number) -> Number:
    """The smaller of two; NaN if x is."""
    if isinstance(x, Tensor):
        return x.clamp(max=high)
    return high if x > high else x


def ratio(x: Number, y: Number) -> Number:
    """Their quotient."""
    if isinstance(x, Tensor) or isinstance(y, Tensor) or y != 0:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


def log(x: Number) -> Number:
    """Natural logarithm: -Inf of zero."""
    if isinstance(x, Tensor):
        return x.log()
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def exp(x: Number) -> Number:
    """Of a number that is no logarithm of more than float64 holds, else Inf."""
    if isinstance(x, Tensor):
        return x.exp()
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
