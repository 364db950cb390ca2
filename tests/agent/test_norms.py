"""Norms of plain tensors: exact to rounding, and honest about what is not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.norms import Norms, NormSummary
from foreshock._arithmetic.parameters import ParameterLayout

pytestmark = pytest.mark.usefixtures("arithmetic")
NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


def reference(gradient: Tensor) -> float:
    return float(gradient.double().square().sum().sqrt())


def values(norms: Norms) -> list[float]:
    assert isinstance(norms, type(arithmetic_for(CPU).zeros(1)))
    return norms.tolist() if isinstance(norms, Tensor) else norms


def norms_of(*gradients: Tensor) -> list[float]:
    return values(arithmetic_for(CPU).norms(list(gradients)))


def summary_of(*norms: float, parameters: list[int] | None = None, layers: list[int] | None = None) -> NormSummary:
    """parameters: that the norms are of. layers: of each parameter."""
    layer_of = list(range(max(parameters or [], default=len(norms)) + 1)) if layers is None else layers
    order = tuple(range(len(norms)) if parameters is None else parameters)
    arithmetic = arithmetic_for(CPU)
    found = arithmetic.row([arithmetic.constant(norm) for norm in norms]) if norms else arithmetic.zeros(0)
    layout = ParameterLayout(order, layer_of, max(layer_of) + 1, CPU, range(len(layer_of)))
    return arithmetic.summarize(found, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_many_elements_is_that_of_double_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    # fp16's own largest number is 65504: a norm kept in it is infinite, one in bfloat16 has three digits.
    gradient = (300 * torch.randn(1_000_003)).to(dtype)
    (norm,) = norms_of(gradient)
    assert norm == pytest.approx(reference(gradient), rel=1e-4)
    if dtype != torch.float32:
        stock = float(torch.linalg.vector_norm(gradient))
        assert not math.isclose(stock, reference(gradient), rel_tol=1e-3)


def test_double_precision_stays_double() -> None:
    torch.manual_seed(3)
    gradient = torch.randn(10_007, dtype=torch.float64)
    assert norms_of(gradient) == [pytest.approx(reference(gradient), rel=1e-14)]


def test_gradients_of_several_dtypes_are_measured_together() -> None:
    gradients = [torch.full((4,), 3.0, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert norms_of(*gradients) == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("value", [1e25, 3e38, 1e-30])
def test_a_sum_of_squares_beyond_float32_is_no_infinite_norm(value: float) -> None:
    gradients = [torch.full((100,), value), torch.ones(4)]
    norms = norms_of(*gradients)
    if value > 1:
        assert norms == pytest.approx([10 * value, 2.0], rel=1e-6)
        assert float(summary_of(*norms).total) == pytest.approx(10 * value, rel=1e-6)
    else:
        assert norms[0] < 1e-20 and norms[1] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_nan_beats_an_inf_and_neither_spreads_to_other_parameters(dtype: torch.dtype) -> None:
    elements = ([1.0, 2.0], [1.0, NAN], [-INF, 1.0], [NAN, INF], [0.0, 0.0])
    norms = norms_of(*(torch.tensor(e, dtype=dtype) for e in elements))
    assert [str(n) for n in norms[1:]] == ["nan", "inf", "nan", "0.0"]
    assert norms[0] == pytest.approx(5**0.5)


def test_nothing_to_measure_is_no_norms() -> None:
    assert norms_of() == []
    assert norms_of(torch.zeros(0), torch.ones(1)) == [0.0, 1.0]


def test_a_summary_counts_nan_and_inf_apart_and_names_the_first() -> None:
    summary = summary_of(1.0, INF, NAN, INF, 2.0, parameters=[9, 7, 5, 3, 1])
    assert (float(summary.nan_parameters), float(summary.inf_parameters)) == (1.0, 2.0)
    assert float(summary.first_nonfinite) == 7.0
    assert math.isnan(float(summary.total))


def test_only_inf_makes_an_infinite_total() -> None:
    summary = summary_of(1.0, INF)
    assert float(summary.total) == INF and float(summary.nan_parameters) == 0.0


def test_the_last_parameter_alone_is_found_too() -> None:
    assert float(summary_of(1.0, 1.0, NAN).first_nonfinite) == 2.0


def test_a_finite_summary_blames_nobody() -> None:
    summary = summary_of(3.0, 4.0, 12.0, layers=[0, 0, 1])
    assert float(summary.total) == 13.0
    assert values(summary.layers) == [5.0, 12.0]
    assert (float(summary.nan_parameters), float(summary.inf_parameters)) == (0.0, 0.0)
    assert float(summary.first_nonfinite) == -1.0


def test_a_bad_layer_does_not_spoil_the_others() -> None:
    layers = values(summary_of(3.0, NAN, 4.0, INF, layers=[0, 1, 0, 2]).layers)
    assert layers[0] == 5.0 and math.isnan(layers[1]) and layers[2] == INF


def test_a_summary_of_nothing_is_zero() -> None:
    empty = summary_of()
    assert (float(empty.total), float(empty.first_nonfinite), values(empty.layers)) == (0.0, -1.0, [0.0])


def test_unscaling_divides_norms_and_leaves_counts() -> None:
    scale = arithmetic_for(CPU).constant(4.0)
    summary = arithmetic_for(CPU).unscaled(replace(summary_of(8.0, INF), largest=scale), scale)
    assert values(summary.layers)[:2] == [2.0, INF] and float(summary.largest or 0.0) == 1.0
    assert (float(summary.inf_parameters), float(summary.first_nonfinite)) == (1.0, 1.0)


def test_the_largest_element_is_found_whatever_its_sign_and_dtype() -> None:
    gradients = [torch.tensor([1.0, -7.5]), torch.tensor([7.0], dtype=torch.bfloat16), torch.empty(0)]
    gradients += [torch.tensor([2.0, -8.0], dtype=torch.float16), torch.tensor([1.0, -INF]), torch.tensor([NAN, INF])]
    arithmetic = arithmetic_for(CPU)
    *finite, not_a_number = maxima = values(arithmetic.maxima(gradients))
    assert finite == [7.5, 7.0, 8.0, INF] and math.isnan(not_a_number)
    assert values(arithmetic.maxima([])) == []
    assert math.isnan(float(arithmetic.largest(arithmetic.maxima(gradients)))) and len(maxima) == 5
    assert float(arithmetic.largest(arithmetic.maxima(gradients[:-2]))) == 8.0


def test_a_nan_beside_an_inf_makes_a_total_that_is_none() -> None:
    assert math.isnan(float(summary_of(INF, NAN).total)) and math.isnan(float(summary_of(NAN, INF, 1.0).total))
