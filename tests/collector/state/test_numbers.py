"""Numbers that are right and rare: exactly zero, the smallest and the largest, rates that jump, the very first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.detection import Detector
from foreshock_collector.analysis.noise import NoiseScale
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.cli import diagnose
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay
from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.server import Server
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.totals import Totals
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, families, hello, serving, steps, value


def test_losses_of_exactly_zero_are_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,grad_norm,lr\n" + "".join(f"{i},0.0,{1 + 0.01 * (i % 7)},1e-4\n" for i in range(400)))
    assert diagnose([str(path)]) == 0
    assert "healthy" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [0.0, -1.0, 5e-324, -1e308, 1e308])
@pytest.mark.parametrize("norm", [0.0, 5e-324, 1.0, 1e308])
def test_constants_of_any_size_are_healthy(loss: float, norm: float) -> None:
    found = replay([Row(step=i, loss=loss, norm=norm, rate=0.1) for i in range(300)])
    assert found.verdict.cause == "healthy"
    assert not found.events


def test_gradients_that_vanish_are_told_of_with_their_parts() -> None:
    rows = [Row(step=i, loss=2.0, norm=1.0 if i < 50 else 1e-6, rate=0.1) for i in range(300)]
    verdict = replay(rows).verdict
    assert verdict.cause == "vanishing_gradients"
    assert verdict.evidence == ("relative to the start: norm 1e-06, loss 1",)


def test_a_loss_that_grows_out_of_next_to_nothing_is_a_finite_rise() -> None:
    detector = Detector()
    for sequence in range(1, 101):
        detector.update(attempt=0, sequence=sequence, step=sequence, norm=1.0, loss=1e-150 if sequence < 60 else 1e150)
    loss = detector.loss
    numbers = (loss.mean, loss.recent, loss.deviation, loss.total, loss.peak)
    assert all(map(math.isfinite, numbers))


def test_a_learning_rate_may_jump_by_any_factor() -> None:
    detector = Detector()
    for sequence, rate in enumerate([1e300, 5e-324, 0.0, 1e300, 1e-4], 1):
        detector.update(attempt=0, sequence=sequence, step=sequence, norm=1.0, loss=None, rate=rate)
    assert detector.rate == 1e-4
    assert detector.gradient.accepting > 0


def test_the_usual_band_ends_at_the_largest_number() -> None:
    channel = ChannelState()
    channel.scan([1e300, 1e308] * 50, DEFAULT.gradient)
    band = channel.band(DEFAULT.gradient)
    assert band is not None
    assert all(map(math.isfinite, band))


def test_a_noise_that_is_beyond_measure_does_not_blind_what_follows() -> None:
    scale = NoiseScale()
    scale.update(1e-300, 1e99, 2)
    for _ in range(100):
        scale.update(0.75, 1.0, 2)
    assert scale.value == pytest.approx(2 * (1 / 0.75 - 1) / (2 - 1 / 0.75))


def test_numbers_are_cut_where_they_come_in() -> None:
    batch = steps(1, [1e308, 5e-324, math.inf, -1e308], first_nonfinite_local=[1e300, math.nan, -1, 3]).steps
    rows = decode(batch, 0).rows
    assert rows["global_norm"].tolist() == [1e150, 0.0, math.inf, -1e150]
    assert rows["first_nonfinite_local"].tolist() == [-1, -1, -1, 3]


@pytest.mark.parametrize("finalized", [0, 5])
def test_the_first_step_that_a_collector_sees_has_no_duration(finalized: int) -> None:
    buffer = RecordBuffer(world_size=1, layers=0, finalized=finalized)
    uptime = steps(finalized + 1, [1.0, 1.0], monotonic_seconds=[1e6, 1e6 + 0.5]).steps
    buffer.write(0, decode(uptime, 0), 0.0)
    assert [step.duration_seconds for step in buffer.finalize(0, finalized + 2)] == [None, 0.5]


def test_layers_are_told_of_once_there_are_steps() -> None:
    model = pb.ModelSummary(type="M", parameters=["a.w"], parameter_sizes=[1], layers=["a"], parameter_layers=[0])
    attempt = Attempt(0, hello(model=model).hello)
    attempt.due(0.0)
    assert attempt.largest_layers() == []
    batch = steps(1, [2.0], global_layer_norms=[2.0]).steps
    attempt.buffer.write(0, decode(batch, 1), 0.0)
    list(attempt.assemble(1))
    assert attempt.largest_layers() == [("a", 2.0)]


def layered(layers: int) -> Attempt:
    names = [f"layer{i}" for i in range(layers)]
    model = pb.ModelSummary(
        type="M",
        parameters=[f"{name}.w" for name in names],
        parameter_sizes=[1] * layers,
        layers=names,
        parameter_layers=range(layers),
    )
    attempt = Attempt(0, hello(model=model).hello)
    attempt.due(0.0)
    return attempt


def measure_weights(attempt: Attempt, sequence: int, **blocks: Any) -> None:
    batch = steps(sequence, [2.0], weight_rows=[0], **blocks).steps
    attempt.buffer.write(0, decode(batch, len(attempt.model.layers)), 0.0)
    list(attempt.assemble(sequence))


def test_layers_with_the_largest_update_ratios_are_chosen_and_their_newest_values_told() -> None:
    attempt = layered(20)
    assert all(not values for values in attempt.layer_weights().values())
    # Before the first update, the largest weights are what can be chosen by.
    measure_weights(attempt, 1, parameter_layer_norms=[float(i + 1) for i in range(20)])
    chosen = attempt.layer_weights()
    assert chosen["parameter_layer_norms"] == [(f"layer{i}", i + 1.0) for i in range(4, 20)]
    assert chosen["update_layer_ratios"] == []
    ratios = [float(20 - i) for i in range(20)]
    measure_weights(attempt, 2, parameter_layer_norms=[5.0] * 20, update_layer_ratios=ratios)
    measure_weights(attempt, 3, parameter_layer_norms=[6.0] * 20)
    chosen = attempt.layer_weights()
    assert chosen["update_layer_ratios"] == [(f"layer{i}", 20.0 - i) for i in range(16)]
    assert chosen["parameter_layer_norms"] == [(f"layer{i}", 6.0) for i in range(16)]
    assert chosen["first_moment_layer_norms"] == []


def test_a_layer_whose_weights_are_not_finite_keeps_its_newest_finite_values() -> None:
    attempt = layered(2)
    measure_weights(attempt, 1, parameter_layer_norms=[1.0, 2.0], update_layer_ratios=[0.5, 0.25])
    measure_weights(attempt, 2, parameter_layer_norms=[math.nan, 3.0], update_layer_ratios=[math.inf, 0.125])
    chosen = attempt.layer_weights()
    assert chosen["parameter_layer_norms"] == [("layer0", 1.0), ("layer1", 3.0)]
    assert chosen["update_layer_ratios"] == [("layer0", 0.5), ("layer1", 0.125)]


def test_metrics_answer_between_a_hello_with_layers_and_the_first_step(tmp_path: Path) -> None:
    async def test() -> None:
        model = pb.ModelSummary(type="M", parameters=["a.w"], parameter_sizes=[1], layers=["a"], parameter_layers=[0])
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello("x", model=model))
            await stream.stored(0)
            found = await families(server)
            assert value(found, "foreshock_run_ranks_reporting", run="x") == 1
            weights: dict[str, Any] = {
                "parameter_layer_norms": [4.0],
                "update_layer_ratios": [0.5],
                "first_moment_layer_norms": [3.0],
            }
            await stream.send(steps(1, [2.0], run="x", global_layer_norms=[2.0], weight_rows=[0], **weights))
            await stream.stored(1)
            found = await families(server)
            assert value(found, "foreshock_layer_gradient_norm", layer="a") == 2
            assert value(found, "foreshock_layer_parameter_norm", layer="a") == 4
            assert value(found, "foreshock_layer_update_ratio", layer="a") == 0.5
            assert value(found, "foreshock_layer_first_moment_norm", layer="a") == 3
            assert not found["foreshock_layer_second_moment_norm"].samples
            await stream.close()

    serving(test())


def test_a_number_that_is_not_finite_is_left_out_of_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Totals, "stall_threshold", lambda *_: math.inf)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello("x"), steps(1, [2.0], run="x"))
            await stream.stored(1)
            found = await families(server)
            assert not found["foreshock_stall_threshold_seconds"].samples
            assert value(found, "foreshock_global_gradient_norm", run="x") == 2
            await stream.close()

    serving(test())


@pytest.mark.parametrize(
    "columns",
    [
        {"monotonic_seconds": [0.0, 1e308, -1e308]},
        {"monotonic_seconds": [math.nan, math.inf, 0.0]},
        {"learning_rate": [1e300, 5e-324, math.nan]},
        {"global_norm": [-1.7e308, 1.79e308, 5e-324]},
        {"local_norm": [-1.7e308, 1.79e308, math.inf], "flags": [pb.LOCAL_NORMS] * 3},
        {"loss": [-1.79e308, 1.79e308, math.inf], "loss_scale": [1.79e308, math.nan, -1.0]},
        {"step": [2**62, 0, 2**63 - 1]},
    ],
)
def test_no_number_of_a_step_breaks_an_answer_about_others_nor_a_restart(
    tmp_path: Path, columns: dict[str, list[float]]
) -> None:
    async def answers(server: Server) -> None:
        found = await families(server)
        assert value(found, "foreshock_steps", run="honest") == 2
        assert all(math.isfinite(sample.value) for family in found.values() for sample in family.samples)
        async with aiohttp.ClientSession() as session:
            for path in ("", "/odd", "/odd/steps", "/odd/series", "/honest"):
                async with session.get(f"{server.url}/api/v1/runs{path}") as response:
                    assert response.status == 200, path

    async def test() -> None:
        norms = columns.get("global_norm", [1.0] * 3)
        changes: dict[str, Any] = {name: values for name, values in columns.items() if name != "global_norm"}
        odd = hello("odd", launch_id="odd")
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(odd, hello("honest", launch_id="honest"))
            await stream.send(steps(1, norms, run="odd", **changes), steps(1, [1.0, 2.0], run="honest"))
            while [position.sequence for position in await stream.positions(2)] != [2, 3]:
                pass
            await answers(server)
            await stream.close()
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            await answers(server)

    serving(test())
