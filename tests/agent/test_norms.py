"""Norms of plain tensors: exact to rounding, and honest about what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foreshock._norms import NormSummary, gradient_maxima, gradient_norms, summarize

NAN, INF = math.nan, math.inf


def reference(gradient: Tensor) -> float:
    return float(gradient.double().square().sum().sqrt())


def summary_of(*norms: float, parameters: list[int] | None = None, layers: list[int] | None = None) -> NormSummary:
    n = len(norms)
    layer_of = list(range(n)) if layers is None else layers
    return summarize(
        torch.tensor(norms, dtype=torch.float64),
        torch.tensor(list(range(n)) if parameters is None else parameters, dtype=torch.int64),
        torch.tensor(layer_of, dtype=torch.int64),
        max(layer_of, default=0) + 1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_many_elements_is_that_of_double_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    # fp16's own largest number is 65504: a norm kept in it is infinite, one in bfloat16 has three digits.
    gradient = (300 * torch.randn(1_000_003)).to(dtype)
    (norm,) = gradient_norms([gradient])
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(reference(gradient), rel=1e-4)
    if dtype != torch.float32:
        stock = float(torch.linalg.vector_norm(gradient))
        assert not math.isclose(stock, reference(gradient), rel_tol=1e-3)


def test_double_precision_stays_double() -> None:
    torch.manual_seed(3)
    gradient = torch.randn(10_007, dtype=torch.float64)
    assert float(gradient_norms([gradient])) == pytest.approx(reference(gradient), rel=1e-14)


def test_gradients_of_several_dtypes_are_measured_together() -> None:
    gradients = [torch.full((4,), 3.0, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert gradient_norms(gradients).tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("value", [1e25, 3e38, 1e-30])
def test_a_sum_of_squares_beyond_float32_is_no_infinite_norm(value: float) -> None:
    gradients = [torch.full((100,), value), torch.ones(4)]
    norms = gradient_norms(gradients)
    if value > 1:
        assert norms.tolist() == pytest.approx([10 * value, 2.0], rel=1e-6)
        assert float(summarize(norms, torch.arange(2), torch.arange(2), 2).total) == pytest.approx(10 * value, rel=1e-6)
    else:
        assert float(norms[0]) < 1e-20 and float(norms[1]) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_nan_beats_an_inf_and_neither_spreads_to_other_parameters(dtype: torch.dtype) -> None:
    values = ([1.0, 2.0], [1.0, NAN], [-INF, 1.0], [NAN, INF], [0.0, 0.0])
    norms = gradient_norms([torch.tensor(v, dtype=dtype) for v in values])
    assert [str(n) for n in norms.tolist()[1:]] == ["nan", "inf", "nan", "0.0"]
    assert float(norms[0]) == pytest.approx(5**0.5)


def test_nothing_to_measure_is_no_norms() -> None:
    assert gradient_norms([]).tolist() == []
    assert gradient_norms([torch.zeros(0), torch.ones(1)]).tolist() == [0.0, 1.0]


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
    assert summary.layers.tolist() == [5.0, 12.0]
    assert (float(summary.nan_parameters), float(summary.inf_parameters)) == (0.0, 0.0)
    assert float(summary.first_nonfinite) == -1.0


def test_a_bad_layer_does_not_spoil_the_others() -> None:
    layers = summary_of(3.0, NAN, 4.0, INF, layers=[0, 1, 0, 2]).layers.tolist()
    assert layers[0] == 5.0 and math.isnan(layers[1]) and layers[2] == INF


def test_a_summary_of_nothing_is_zero() -> None:
    empty = summary_of()
    assert (float(empty.total), float(empty.first_nonfinite), empty.layers.tolist()) == (0.0, -1.0, [0.0])


def test_unscaling_divides_norms_and_leaves_counts() -> None:
    summary = summary_of(8.0, INF).unscaled(torch.tensor(4.0, dtype=torch.float64))
    assert summary.layers.tolist() == [2.0, INF]
    assert (float(summary.inf_parameters), float(summary.first_nonfinite)) == (1.0, 1.0)


def test_the_largest_element_is_found_whatever_its_sign_and_dtype() -> None:
    gradients = [torch.tensor([1.0, -7.5]), torch.tensor([7.0], dtype=torch.bfloat16), torch.empty(0)]
    gradients += [torch.tensor([2.0, -8.0], dtype=torch.float16), torch.tensor([1.0, -INF]), torch.tensor([NAN, INF])]
    *finite, not_a_number = gradient_maxima(gradients).tolist()
    assert finite == [7.5, 7.0, 8.0, INF] and math.isnan(not_a_number)
    assert gradient_maxima([]).tolist() == []
