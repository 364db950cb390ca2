"""The fingerprint shows any bit, and the norms of weights, updates and moments are what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.norms import WeightSummary
from foreshock._arithmetic.parameters import plan_parameters
from foreshock._measure.samples import SAMPLES, TensorSampler
from foreshock._measure.weights import EVERY_STEPS, Weights, fingerprint
from foreshock_protos.columns import WEIGHT_BLOCKS

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


def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
    return Weights(plan_parameters(model, optimizer), optimizer, arithmetic_for(torch.device("cpu")))


def columns_of(weights: Weights, sequence: int) -> dict[str, float]:
    summary = weights.measure_due(sequence)
    return {} if summary is None else {name: float(value) for name, value in summary.columns.items()}


def layers_of(summary: WeightSummary | None) -> dict[str, list[float]]:
    assert summary is not None and summary.layers is not None
    values = [float(value) for value in summary.layers]
    layers = len(values) // len(WEIGHT_BLOCKS)
    return {name: values[i * layers : (i + 1) * layers] for i, name in enumerate(WEIGHT_BLOCKS)}


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm())


def adam_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_each_measure_comes_on_its_steps_and_the_update_with_the_step_after_it() -> None:
    model = nn.Linear(8, 3)
    weights = measured(model, torch.optim.SGD(model.parameters(), lr=0.1))
    every = weights.every
    found = [columns_of(weights, sequence).keys() for sequence in range(1, EVERY_STEPS + every + 2)]
    looked = [i + 1 for i, names in enumerate(found) if "parameter_norm" in names]
    assert looked == [1, 2, *range(1 + every, EVERY_STEPS + every + 2, every)]
    assert [i + 1 for i, names in enumerate(found) if "update_ratio" in names] == looked[1:]
    assert [i + 1 for i, names in enumerate(found) if "parameter_fingerprint" in names] == [1, EVERY_STEPS + 1]


def test_of_a_small_tensor_every_norm_is_exact_in_total_and_by_layer(arithmetic: str) -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = measured(model, optimizer)
    adam_step(model, optimizer)
    weights.measure_due(weights.every)
    before = [p.detach().clone() for p in model.parameters()]
    adam_step(model, optimizer)
    after = list(model.parameters())
    firsts = [optimizer.state[p]["exp_avg"] for p in after]
    seconds = [optimizer.state[p]["exp_avg_sq"].sqrt() for p in after]
    updates = [a - b for a, b in zip(after, before, strict=True)]
    summary = weights.measure_due(weights.every + 1)
    assert summary is not None
    columns = {name: float(value) for name, value in summary.columns.items()}
    expected = {
        "parameter_norm": norm_of(after),
        "update_ratio": norm_of(updates) / norm_of(after),
        "first_moment_norm": norm_of(firsts),
        "second_moment_norm": norm_of(seconds),
    }
    assert columns == pytest.approx(expected, rel=1e-5)
    for name, tensors in (
        ("parameter_layer_norms", after),
        ("first_moment_layer_norms", firsts),
        ("second_moment_layer_norms", seconds),
    ):
        of_layers = [norm_of(tensors[:2]), norm_of(tensors[2:])]
        assert layers_of(summary)[name] == pytest.approx(of_layers, rel=1e-5)
    ratios = [norm_of(updates[:2]) / norm_of(after[:2]), norm_of(updates[2:]) / norm_of(after[2:])]
    assert layers_of(summary)["update_layer_ratios"] == pytest.approx(ratios, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_a_large_tensor_a_sample_estimates_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Every fourth column stands out: samples of a few columns only would miss them, or see nothing else.
    model = nn.Linear(512, 512, bias=False).to(dtype)
    with torch.no_grad():
        model.weight[:, 3::4] *= 30
    weights = measured(model, torch.optim.SGD(model.parameters(), lr=0.1))
    norm = columns_of(weights, 1)["parameter_norm"]
    assert norm == pytest.approx(norm_of(model.parameters()), rel=0.1)


def test_a_sample_visits_every_column_of_a_matrix() -> None:
    weight = torch.arange(64 * 1024, dtype=torch.float32).reshape(64, 1024)
    samples = TensorSampler([weight]).read([weight])
    assert len({int(value) % 1024 for value in samples.flatten()}) > SAMPLES // 2


def test_a_tensor_in_another_memory_order_is_not_copied() -> None:
    weight = torch.randn(16, 32, 3, 3).to(memory_format=torch.channels_last)
    sampler = TensorSampler([weight])
    norm = float(sampler.squares(sampler.read([weight])).sqrt())
    assert norm == pytest.approx(float(weight.norm()), rel=0.2)
    addresses = {view.untyped_storage().data_ptr() for view in sampler._views}
    assert weight.untyped_storage().data_ptr() in addresses


def test_a_tensor_whose_elements_lie_apart_is_read_anew_each_time() -> None:
    weight = torch.ones(4, 6)[:, :3]
    sampler = TensorSampler([weight])
    assert float(sampler.squares(sampler.read([weight]))) == pytest.approx(12)
    weight *= 2
    assert float(sampler.squares(sampler.read([weight]))) == pytest.approx(48)


def test_an_update_that_the_optimizer_skipped_counts_as_not_measured() -> None:
    model = nn.Linear(8, 3)
    weights = measured(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weights.measure_due(weights.every)
    assert columns_of(weights, weights.every + 1)["update_ratio"] == 0.0


def test_records_of_skipped_steps_do_not_part_an_update_from_its_measurement() -> None:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = measured(model, optimizer)
    weights.measure_due(weights.every)
    adam_step(model, optimizer)
    # Two records of steps that the script has skipped lie in between.
    assert columns_of(weights, weights.every + 3)["update_ratio"] > 0
    assert columns_of(weights, weights.every + 4) == {}


def test_moments_are_measured_once_every_parameter_with_a_gradient_has_them() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weights = measured(model, optimizer)
    assert "first_moment_norm" not in columns_of(weights, 1)
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # The second layer has had no gradient: its moments are zero.
    assert columns_of(weights, 1)["first_moment_norm"] == pytest.approx(
        norm_of(optimizer.state[p]["exp_avg"] for p in model[0].parameters())
    )
    assert layers_of(weights.measure_due(1))["first_moment_layer_norms"][1] == 0.0
    # It has one now, and this rank does not hold its moments, as with a sharded optimizer.
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    assert "first_moment_norm" not in columns_of(weights, 1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_of_sgd_the_momentum_is_its_first_moment(momentum: float) -> None:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    weights = measured(model, optimizer)
    adam_step(model, optimizer)
    columns = columns_of(weights, 1)
    assert "second_moment_norm" not in columns
    if momentum:
        momenta = (optimizer.state[p]["momentum_buffer"] for p in model.parameters())
        assert columns["first_moment_norm"] == pytest.approx(norm_of(momenta))
    else:
        assert "first_moment_norm" not in columns


def test_a_checkpoint_that_replaces_the_moments_and_new_memory_of_the_weights_are_followed() -> None:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weights = measured(model, optimizer)
    adam_step(model, optimizer)
    before = columns_of(weights, 1)
    state = optimizer.state_dict()
    for moments in state["state"].values():
        moments["exp_avg"] = 2 * moments["exp_avg"]
    optimizer.load_state_dict(state)
    model.weight.data, model.bias.data = 3 * model.weight.data, 3 * model.bias.data
    after = columns_of(weights, 1)
    assert after["first_moment_norm"] == pytest.approx(2 * before["first_moment_norm"])
    assert after["parameter_norm"] == pytest.approx(3 * before["parameter_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_shows_in_its_layer_alone(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    weights = measured(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        list(model.parameters())[-1][0] = value
    first, second = layers_of(weights.measure_due(1))["parameter_layer_norms"]
    assert math.isfinite(first) and not math.isfinite(second)
