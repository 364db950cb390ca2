"""Streams into a real server on port 0: refusals, duplicates, gaps, series."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.catalogue import CATALOGUE, INCIDENT_VERDICTS
from foreshock_collector.config import Config, ConfigError, config_from
from foreshock_collector.records.buffer import COLUMNS
from foreshock_collector.server import Server
from foreshock_collector.state.store import Store, StoreError
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb


def hello(run: str = "r", **changes: Any) -> pb.FromRecorder:
    values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "instance": f"{run}-0", "run": run}
    values |= {"experiment": "e", "launch": "l", "topology": pb.Topology(world_size=1)}
    return pb.FromRecorder(hello=pb.Hello(**(values | changes)))


def steps(first: int, norms: list[float], *, run: str = "r", instance: str = "", **changes: Any) -> pb.FromRecorder:
    count = len(norms)
    batch = pb.StepBatch(
        instance=instance or f"{run}-0", first_sequence=first, step=range(first - 1, first - 1 + count)
    )
    for name in COLUMNS:
        getattr(batch, name)[:] = batch.step if name == "step" else [0] * count
    batch.global_norm[:] = norms
    batch.clip_coefficient[:] = [1.0] * count
    batch.monotonic_seconds[:] = [0.1 * (first + i) for i in range(count)]
    for name, value in changes.items():
        getattr(batch, name)[:] = value
    return pb.FromRecorder(steps=batch)


class Listening(Protocol):
    """A collector, in this process or in another."""

    @property
    def address(self) -> str: ...


class Stream:
    """A raw stream: messages go as bytes, so that wrong ones can too."""

    def __init__(self, server: Listening) -> None:
        self._channel = grpc.aio.insecure_channel(server.address)
        open_stream = self._channel.stream_stream(
            "/foreshock.v1.Telemetry/Stream", response_deserializer=pb.Ack.FromString
        )
        self.call = open_stream()

    async def send(self, *messages: pb.FromRecorder | bytes) -> None:
        for message in messages:
            await self.call.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def stored(self, sequence: int) -> None:
        while (await self.call.read()).positions[0].sequence < sequence:
            pass

    async def positions(self, count: int) -> list[pb.Ack.Position]:
        """Those of the next acknowledgement that tells of so many instances."""
        while len(ack := (await self.call.read()).positions) < count:
            pass
        return list(ack)

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        return await self.call.code(), await self.call.details()

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


def serving(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def config(tmp_path: Path, **changes: Any) -> Config:
    return Config(grpc_port=0, http_port=0, database=str(tmp_path / "db"), ack_seconds=0.1, **changes)


async def families(server: Server) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        assert response.status == 200
        return {family.name: family for family in text_string_to_metric_families(await response.text())}


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    (sample,) = (s for s in found[name].samples if labels.items() <= s.labels.items())
    return float(sample.value)


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        ([b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "not a foreshock.v1.FromRecorder"),
        ([hello("x", schema_version=99)], grpc.StatusCode.FAILED_PRECONDITION, "schema version 99"),
        ([hello("x", instance="")], grpc.StatusCode.INVALID_ARGUMENT, "hello.instance"),
        (
            [hello("x"), pb.FromRecorder(goodbye=pb.Goodbye(instance="x-0", last_sequence=2**64 - 1))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "goodbye.last_sequence",
        ),
        ([steps(1, [1.0], run="x")], grpc.StatusCode.INVALID_ARGUMENT, "has not said hello"),
        ([hello("x"), steps(1, [1.0], run="x", loss=[1.0, 2.0])], grpc.StatusCode.INVALID_ARGUMENT, "column loss"),
        ([b"\x00" * (5 * 2**20)], grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    ],
)
def test_a_wrong_message_is_refused_by_name_and_costs_other_runs_nothing(
    tmp_path: Path, messages: list[Any], code: grpc.StatusCode, says: str
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            good, bad = Stream(server), Stream(server)
            await good.send(hello(), steps(1, [1.0, 2.0]))
            await good.stored(2)
            await bad.send(*messages)
            refusal = await bad.refusal()
            assert refusal[0] is code
            assert says in refusal[1]
            await good.send(steps(3, [3.0]))
            await good.stored(3)
            await good.close()
            await bad.close()

    serving(test())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": ""}, "hello.run"),
        ({"launch": "l" * 500}, "hello.launch"),
        ({"started_seconds": math.nan}, "hello.started_seconds"),
        ({"topology": pb.Topology(rank=2, world_size=2)}, "rank 2 of world_size 2"),
        ({"topology": pb.Topology(rank=0, world_size=1)}, "rank 0 of this launch is another instance already"),
        ({"model": pb.ModelSummary(parameters=["w"])}, "0 parameter_sizes for 1 parameters"),
    ],
)
def test_an_instance_that_is_refused_is_told_why_and_the_others_of_its_stream_go_on(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(), hello(**{"instance": "wrong", **changes}))
            await stream.send(steps(1, [1.0], instance="wrong"), steps(1, [1.0, 2.0]))
            right, wrong = await stream.positions(2)
            while right.sequence < 2:
                right, wrong = await stream.positions(2)
            assert (right.instance, right.refused) == ("r-0", "")
            assert (wrong.instance, wrong.sequence) == ("wrong", 0)
            assert says in wrong.refused
            assert value(await families(server), "foreshock_steps") == 2
            await stream.close()

    serving(test())


def test_names_that_cannot_be_printed_refuse_nothing_and_are_shown_as_python_writes_them(tmp_path: Path) -> None:
    async def test() -> None:
        model = pb.ModelSummary(
            type="M\n", module_types={"a\tb": 1}, parameters=["a\nb.w"], parameter_sizes=[1], layers=["a\nb" * 999]
        )
        model.parameter_layers.append(0)
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello(model=model, clip="norm\n1"), steps(1, [2.0], global_layer_norms=[2.0]))
            await stream.stored(1)
            found = await families(server)
            assert value(found, "foreshock_run_info", model=r"M\n", clip=r"norm\n1") == 1
            (sample,) = found["foreshock_layer_gradient_norm"].samples
            assert sample.labels["layer"].startswith(r"a\nba\nb")
            assert len(sample.labels["layer"]) == 2000
            await stream.close()

    serving(test())


def test_a_run_has_the_rules_of_every_pattern_that_fits_its_name(tmp_path: Path) -> None:
    file = tmp_path / "collector.toml"
    file.write_text(
        '[runs."llm-*"]\nrecovered_after = 100\n[runs."llm-*".gradient]\nspike_z = 8\n[runs."*-7b"]\nlead_steps = 64\n'
    )
    chosen = config_from(["--config", str(file)], {})
    rules = chosen.rules_of("llm-7b")
    assert (rules.recovered_after, rules.gradient.spike_z, rules.lead_steps) == (100, 8.0, 64)
    assert chosen.rules_of("other") == DEFAULT

    async def test() -> None:
        async with Server(config(tmp_path, runs={"quiet": {"gradient": {"spike_z": 1e9}}})) as server:
            stream = Stream(server)
            for run in ("quiet", "usual"):
                await stream.send(hello(run), steps(1, [*[1.0] * 60, 50.0, 1.0], run=run))
            await stream.stored(62)
            found = await families(server)
            assert value(found, "foreshock_gradient_spikes", run="quiet") == 0
            assert value(found, "foreshock_gradient_spikes", run="usual") == 1
            await stream.close()

    serving(test())


def test_records_sent_again_count_once_and_a_gap_is_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            first = Stream(server)
            await first.send(hello(), steps(1, [1.0] * 10))
            await first.stored(10)
            await first.close()
            again = Stream(server)
            await again.send(hello(), steps(6, [1.0] * 10), steps(21, [1.0] * 5))
            await again.stored(25)
            await again.close()
            found = await families(server)
            assert value(found, "foreshock_steps") == 20
            assert value(found, "foreshock_records_dropped", reason="ring_overrun") == 5

    serving(test())


def test_what_is_looked_at_now_and_then_keeps_its_newest_value(tmp_path: Path) -> None:
    async def test() -> None:
        looked: dict[str, Any] = {
            "gradient_absolute_maximum": [0.25, 0, 0],
            "parameter_norm": [12.0, 0, 0],
            "update_ratio": [0, 1e-3, 0],
        }
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello())
            await stream.send(steps(1, [1.0] * 3))
            await stream.stored(3)
            found = await families(server)
            assert not any(found[f"foreshock_{name}"].samples for name in looked)
            await stream.send(steps(4, [1.0] * 3, **looked), steps(7, [1.0], gradient_absolute_maximum=[math.nan]))
            await stream.stored(7)
            found = await families(server)
            assert {name: value(found, f"foreshock_{name}") for name in looked} == {
                name: max(values) for name, values in looked.items()
            }
            await stream.close()

    serving(test())


def test_every_counter_is_there_at_zero_from_the_hello_on_and_all_is_in_the_catalogue(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello())
            await stream.stored(0)
            await stream.close()
            found = await families(server)
            for source in ("loss", "gradient"):
                for kind in ("nan", "inf"):
                    assert value(found, "foreshock_nonfinite_steps", source=source, kind=kind) == 0
            for verdict in INCIDENT_VERDICTS:
                assert value(found, "foreshock_incidents", verdict=verdict) == 0
            assert found.keys() == {series.name.removesuffix("_total") for series in CATALOGUE}
            labels = {series.name.removesuffix("_total"): set(series.labels) for series in CATALOGUE}
            for name, family in found.items():
                for sample in family.samples:
                    assert sample.labels.keys() - {"le"} == labels[name], sample

    serving(test())


def test_a_nan_is_counted_and_never_exported_as_a_gauge(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            flags = [pb.LOSS_OBSERVED] * 3
            bad = steps(
                1, [1.0, 2.0, float("nan")], flags=flags, loss=[1, 1, float("nan")], global_nan_parameters=[0, 0, 1]
            )
            await stream.send(hello(), bad)
            await stream.stored(3)
            await stream.close()
            found = await families(server)
            while value(found, "foreshock_steps") < 3:
                found = await families(server)
            assert value(found, "foreshock_global_gradient_norm") == 2.0
            assert value(found, "foreshock_nonfinite_steps", source="loss", kind="nan") == 1
            assert value(found, "foreshock_incidents", verdict="sudden_nonfinite") == 1
            for family in found.values():
                assert all(sample.value == sample.value for sample in family.samples)

    serving(test())


def test_the_health_service_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server, grpc.aio.insecure_channel(server.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    serving(test())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ack-seconds", "30"], "--ack-seconds must be at most 5, not 30"),
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--grpc-port", "many"], "--grpc-port must be a whole number"),
        (["--http-port", "70000"], "--http-port"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_from(arguments, {})


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"not a database, but long enough to be looked at as if it were one" * 20)
    with pytest.raises(StoreError, match="cannot be used"):
        Store(path)
