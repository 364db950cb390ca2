"""Numbers on the host and numbers on the device come to the same, also where floats would raise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from foreshock import _numbers
from foreshock._numbers import Number, on_host

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
VALUES = [0.0, -0.0, 1.0, -2.5, 1e300, -1e300, 1e-320, 800.0, INF, -INF, NAN]
ONE: list[Callable[[Number], Number]] = [_numbers.log, _numbers.exp, _numbers.absolute]
TWO: list[Callable[[Number, Number], Number]] = [
    _numbers.ratio,
    lambda x, y: _numbers.at_least(x, 1.0 if math.isnan(float(y)) else y),
    lambda x, y: _numbers.at_most(x, 1.0 if math.isnan(float(y)) else y),
    lambda x, y: _numbers.where(_numbers.finite(x), x, y),
    lambda x, y: _numbers.where(_numbers.is_nan(x), y, x),
    lambda x, y: _numbers.counted(_numbers.finite(x)) + _numbers.counted(_numbers.is_nan(y)),
]


def there(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def same(found: Number, expected: Number) -> bool:
    assert isinstance(found, float) and isinstance(expected, torch.Tensor) and expected.dtype == torch.float64
    return found == pytest.approx(float(expected), rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("function", ONE, ids=["log", "exp", "absolute"])
def test_a_function_of_one_number_is_the_same(function: Callable[[Number], Number]) -> None:
    differ = [x for x in VALUES if not same(function(x), function(there(x)))]
    assert differ == []


@pytest.mark.parametrize("function", TWO, ids=["ratio", "at_least", "at_most", "finite", "is_nan", "counted"])
def test_a_function_of_two_numbers_is_the_same(function: Callable[[Number, Number], Number]) -> None:
    pairs = [(x, y) for x in VALUES for y in VALUES]
    differ = [(x, y) for x, y in pairs if not same(function(x, y), function(there(x), there(y)))]
    assert differ == []


def test_what_comes_from_a_tensor_is_a_float_on_the_host_and_float64_elsewhere(arithmetic: str) -> None:
    kind = float if arithmetic == "host" else torch.Tensor
    assert on_host(CPU) == (arithmetic == "host")
    found = [_numbers.number(torch.tensor([3.0], dtype=torch.bfloat16)), _numbers.constant(3.0, CPU)]
    found += _numbers.numbers(torch.tensor([3.0, 3.0]))
    found += _numbers.numbers(_numbers.vector(found, CPU))
    for each in found:
        assert isinstance(each, kind) and float(each) == 3.0
        assert isinstance(each, float) or (each.dtype == torch.float64 and each.dim() == 0)


def test_a_row_of_numbers_is_one_tensor(arithmetic: str) -> None:
    row = _numbers.vector([_numbers.constant(1.0, CPU), 2.0], CPU)
    assert row.dtype == torch.float64 and row.tolist() == [1.0, 2.0]


def test_a_loss_that_needs_a_gradient_is_read_without_a_warning() -> None:
    assert _numbers.number(2 * torch.ones(1, requires_grad=True)) == 2.0
