"""Numbers on the host and numbers on the device come to the same, also where floats would raise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from foreshock._arithmetic.arithmetic import Arithmetic, arithmetic_for
from foreshock._arithmetic.device import DeviceArithmetic
from foreshock._arithmetic.host import HostArithmetic
from foreshock._arithmetic.norms import Number

CPU = torch.device("cpu")
HOST, DEVICE = HostArithmetic(), DeviceArithmetic(CPU)
NAN, INF = math.nan, math.inf
VALUES = [0.0, -0.0, 1.0, -2.5, 1e300, -1e300, 1e-320, 800.0, INF, -INF, NAN]
ONE: dict[str, Callable[[Arithmetic, Number], Number]] = {
    "log": lambda a, x: a.log(x),
    "exp": lambda a, x: a.exp(x),
    "absolute": lambda a, x: a.absolute(x),
}
TWO: dict[str, Callable[[Arithmetic, Number, Number], Number]] = {
    "ratio": lambda a, x, y: a.ratio(x, y),
    "at_least": lambda a, x, y: a.at_least(x, 1.0 if math.isnan(float(y)) else y),
    "at_most": lambda a, x, y: a.at_most(x, 1.0 if math.isnan(float(y)) else y),
    "finite": lambda a, x, y: a.where(a.finite(x), x, y),
    "is_nan": lambda a, x, y: a.where(a.is_nan(x), y, x),
    "counted": lambda a, x, y: a.counted(a.finite(x)) + a.counted(a.is_nan(y)),
}


def there(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def same(found: Number, expected: Number) -> bool:
    assert isinstance(found, float) and isinstance(expected, torch.Tensor) and expected.dtype == torch.float64
    return found == pytest.approx(float(expected), rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("name", ONE)
def test_a_function_of_one_number_is_the_same(name: str) -> None:
    differ = [x for x in VALUES if not same(ONE[name](HOST, x), ONE[name](DEVICE, there(x)))]
    assert differ == []


@pytest.mark.parametrize("name", TWO)
def test_a_function_of_two_numbers_is_the_same(name: str) -> None:
    function = TWO[name]
    pairs = [(x, y) for x in VALUES for y in VALUES]
    differ = [(x, y) for x, y in pairs if not same(function(HOST, x, y), function(DEVICE, there(x), there(y)))]
    assert differ == []


def test_what_comes_from_a_tensor_is_a_float_on_the_host_and_float64_elsewhere(arithmetic: str) -> None:
    kind = float if arithmetic == "host" else torch.Tensor
    chosen = arithmetic_for(CPU)
    assert isinstance(chosen, HostArithmetic) == (arithmetic == "host")
    found = [chosen.number(torch.tensor([3.0], dtype=torch.bfloat16)), chosen.constant(3.0)]
    found += chosen.numbers(torch.tensor([3.0, 3.0]))
    found += chosen.numbers(chosen.vector(found))
    for each in found:
        assert isinstance(each, kind) and float(each) == 3.0
        assert isinstance(each, float) or (each.dtype == torch.float64 and each.dim() == 0)


def test_one_is_known_only_where_no_read_back_is_needed(arithmetic: str) -> None:
    chosen = arithmetic_for(CPU)
    assert chosen.is_one(chosen.constant(1.0)) == (arithmetic == "host") and not chosen.is_one(chosen.constant(2.0))


def test_a_row_of_numbers_is_one_tensor(arithmetic: str) -> None:
    chosen = arithmetic_for(CPU)
    values = [chosen.constant(1.0), chosen.constant(2.0)]
    row = chosen.vector(values)
    assert row.dtype == torch.float64 and row.tolist() == [1.0, 2.0]
    assert list(map(float, chosen.row(values, chosen.zeros(2)))) == [1.0, 2.0, 0.0, 0.0]


def test_a_loss_that_needs_a_gradient_is_read_without_a_warning(arithmetic: str) -> None:
    assert arithmetic_for(CPU).number(2 * torch.ones(1, requires_grad=True)) == 2.0
