"""The fingerprint shows any bit, and the movement is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foreshock._weights import EVERY_STEPS, Weights, fingerprint

SIZES = ((3, 5), (7,), (1,))


def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_single_bit_changes_the_fingerprint_and_nothing_else_does(dtype: torch.dtype) -> None:
    known = parameters(dtype)
    usual = fingerprint(known)
    assert 0 <= float(usual) < 2**52 and float(usual).is_integer()
    assert float(fingerprint([p.clone() for p in known])) == float(usual)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[known[0].element_size()]
    bits = 8 * known[0].element_size()
    seen = set()
    for bit in range(bits):
        # The sign of the integer is its highest bit.
        mask = -(2 ** (bits - 1)) if bit == bits - 1 else 1 << bit
        changed = [p.clone() for p in known]
        changed[1].view(width)[4] ^= mask
        seen.add(float(fingerprint(changed)))
    assert float(usual) not in seen


def test_two_parameters_that_have_changed_places_show() -> None:
    a, b = torch.ones(4), torch.zeros(4)
    assert float(fingerprint([a, b])) != float(fingerprint([b, a]))


def test_a_parameter_that_is_not_contiguous_counts_by_its_values() -> None:
    weight = torch.randn(4, 6)
    assert float(fingerprint([weight.t()])) == float(fingerprint([weight.t().contiguous()]))


def test_weights_are_looked_at_now_and_then_and_the_movement_of_the_step_before_is_told() -> None:
    model = nn.Linear(8, 3)
    weights = Weights(tuple(model.parameters()))
    told = []
    for sequence in range(1, 2 * EVERY_STEPS + 3):
        columns = weights.look(sequence)
        told.append(("parameter_fingerprint" in columns, "update_ratio" in columns))
        if sequence == 1:
            size = torch.cat([p.detach().double().flatten() for p in model.parameters()]).norm()
            assert float(columns["parameter_norm"]) == pytest.approx(float(size), rel=1e-6)
        if sequence == 2:
            assert float(columns["update_ratio"]) == pytest.approx(0.01, rel=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    looked = [i + 1 for i, (look, _) in enumerate(told) if look]
    moved = [i + 1 for i, (_, move) in enumerate(told) if move]
    assert looked == [1, EVERY_STEPS + 1, 2 * EVERY_STEPS + 1]
    assert moved == [2, EVERY_STEPS + 2, 2 * EVERY_STEPS + 2]
