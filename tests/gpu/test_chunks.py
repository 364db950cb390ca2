"""Norms of all gradients in one launch: exact to rounding, NaN and Inf told apart."""

from __future__ import annotations

import math
import platform
import sys

import pytest
import torch
from torch import Tensor

from tests.support.kernels import DEVICE, INTERPRETED, on_device, plan_of

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has wheels for Linux on x86-64 only", allow_module_level=True)

from foreshock._kernels import chunks
from foreshock._kernels.tables import ChunkTable, GradientSums, is_dense

NAN, INF = math.nan, math.inf
pytestmark: list[pytest.MarkDecorator] = [] if INTERPRETED else [pytest.mark.gpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sums_of(gradients: list[Tensor | None], layers: int = 1) -> tuple[ChunkTable, GradientSums]:
    known = [torch.zeros(0) if gradient is None else gradient for gradient in gradients]
    plan = plan_of(*(g.numel() for g in known), layers=layers, dtypes=[g.dtype for g in known])
    table = ChunkTable(plan)
    sums = GradientSums(table)
    sums.measure(on_device(gradients))
    return table, sums


def norms_of(*gradients: Tensor | None) -> list[float]:
    """Norm of each gradient, by the kernel."""
    _, sums = sums_of(list(gradients))
    norms: list[float] = sums.norms().tolist()
    return norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2047, 2048, chunks.CHUNK, 3 * chunks.CHUNK + 5])
def test_a_norm_is_that_of_double_precision(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    gradient = (300 * torch.randn(size)).to(dtype)
    assert norms_of(gradient) == [pytest.approx(float(gradient.double().norm()), rel=1e-6)]


@pytest.mark.parametrize("value", [1e25, 3e38, 1e-25, 1e-30, 1e-44])
def test_squares_that_float32_cannot_hold_are_exact_too(value: float) -> None:
    gradient = torch.full((5000,), value)
    assert norms_of(gradient, torch.ones(4)) == pytest.approx([float(gradient.double().norm()), 2.0], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_beats_an_inf_and_neither_spreads_to_other_parameters(dtype: torch.dtype) -> None:
    elements = ([1.0, 2.0], [1.0, NAN], [-INF, 1.0], [NAN, INF], [0.0, 0.0])
    gradients = [torch.tensor(e, dtype=dtype) for e in elements]
    assert [str(norm) for norm in norms_of(*gradients)[1:]] == ["nan", "inf", "nan", "0.0"]
    _, sums = sums_of([*gradients])
    assert (sums.statuses % chunks.STATUSES.value).tolist() == [0, 2, 1, 2, 0]


def test_a_nan_in_one_chunk_and_an_inf_in_another_make_a_parameter_with_a_nan() -> None:
    for order in ([0, 1], [1, 0]):
        gradient = torch.ones(2 * chunks.CHUNK)
        gradient[[place * chunks.CHUNK for place in order]] = torch.tensor([NAN, INF])
        _, sums = sums_of([gradient])
        assert (sums.statuses % chunks.STATUSES.value).tolist() == [chunks.HAS_NAN.value]


def test_gradients_of_several_dtypes_are_measured_in_one_launch() -> None:
    assert norms_of(*(torch.full((4,), 3.0, dtype=dtype) for dtype in DTYPES)) == [6.0] * 4


def test_parameters_without_a_gradient_or_without_elements_are_zero() -> None:
    table = ChunkTable(plan_of(4, 0, 3, 2))
    sums = GradientSums(table)
    ones = [torch.ones(size, device=DEVICE) for size in (4, 0, 3, 2)]
    sums.measure([ones[0], ones[1], None, ones[3]])
    # Layers take turns: those of the first parameter come first.
    assert table.owner_of_chunk.tolist() == [0, 2, 1, 3] and table.layer_begin.tolist() == [0, 2, 4]
    assert sums.squares.tolist() == [4.0, 0.0, 0.0, 2.0]
    sums.measure([None, *ones[1:3], None])
    assert sums.squares.tolist() == [0.0, 3.0, 0.0, 0.0]


def test_gradients_that_do_not_lie_densely_are_copied_at_each_step() -> None:
    sums = GradientSums(ChunkTable(plan_of(4, 6)))
    ones, row = torch.ones(4, device=DEVICE), torch.ones(2, device=DEVICE)
    for factor in (1.0, 3.0):
        row.fill_(factor)
        sums.measure([ones, row.expand(3, 2)])
        assert sums.squares.tolist() == [4.0, 6.0 * factor**2]
    sums.measure([ones, torch.ones(3, 2, device=DEVICE).t()])
    assert sums.squares.tolist() == [4.0, 6.0]


def test_gradients_of_a_dtype_that_no_kernel_reads_are_measured_in_double_precision() -> None:
    gradient = torch.tensor([2.0, -4.0]).to(torch.float8_e5m2)
    assert norms_of(gradient, torch.ones(4)) == pytest.approx([math.sqrt(20), 2.0])


def test_gradients_may_change_their_dtype_as_a_model_does() -> None:
    sums = GradientSums(ChunkTable(plan_of(4, 4)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        sums.measure([torch.full((4,), 3.0, dtype=dtype, device=DEVICE), None])
        assert sums.squares.tolist() == [36.0, 0.0]


def test_a_gradient_on_another_device_is_never_read() -> None:
    sums = GradientSums(ChunkTable(plan_of(4)))
    with pytest.raises(ValueError, match="has moved"):
        sums.measure([torch.ones(4, device="meta")])
    assert sums.measurement == 0
    sums.measure([torch.ones(4, device=DEVICE)])
    assert sums.squares.tolist() == [4.0]


def test_a_tensor_is_dense_whatever_the_order_of_its_dimensions() -> None:
    image = torch.ones(2, 3, 4, 5)
    dense = [image, image.contiguous(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), torch.ones(3, 0)]
    assert all(map(is_dense, dense))
    assert not any(map(is_dense, (image[:, :2], image[..., ::2], torch.ones(1).expand(4))))
