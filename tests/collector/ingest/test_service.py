"""Streams into a real server on port 0: refusals, duplicates, gaps, series."""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.server import Server
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import Stream, config, families, goodbye, hello, serving, steps, value


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        ([b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "not a foreshock.v1.FromRecorder"),
        ([hello("x", schema_version=99)], grpc.StatusCode.FAILED_PRECONDITION, "schema version 99"),
        ([hello("x", instance="")], grpc.StatusCode.INVALID_ARGUMENT, "hello.instance"),
        ([steps(1, [1.0], run="x")], grpc.StatusCode.INVALID_ARGUMENT, "has not said hello"),
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
        ({"started_seconds": math.nan}, "hello.started_seconds"),
        ({"topology": pb.Topology(rank=2, world_size=2)}, "rank 2 of world_size 2"),
        ({"topology": pb.Topology(rank=0, world_size=1)}, "rank 0 of this launch is another instance already"),
        ({"topology": pb.Topology(world_size=65_537)}, "rank 0 of world_size 65537"),
        ({"model": pb.ModelSummary(parameters=["w"])}, "0 parameter_sizes for 1 parameters"),
        ({"model": pb.ModelSummary(layers=["l"] * 65_537)}, "hello.model has 65537 layers, the limit is 65536"),
        (
            {"model": pb.ModelSummary(parameters=["w"], parameter_sizes=[1], parameter_layers=[2], layers=["a", "b"])},
            "parameter_layers points beyond the 2 layers",
        ),
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


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (steps(1, [1.0], instance="wrong", loss=[1.0, 2.0]), "column loss has 2 rows"),
        # An older agent that lacks a column which is not optional.
        (steps(1, [1.0], instance="wrong", monotonic_seconds=[]), "column monotonic_seconds has 0 rows"),
        (steps(2**60, [1.0], instance="wrong"), "first_sequence"),
        (pb.FromRecorder(exit=pb.Exit(instance="wrong", last_sequence=2**64 - 1)), "exit.last_sequence"),
        (pb.FromRecorder(exit=pb.Exit(instance="wrong", reason=99)), "exit.reason 99"),  # type: ignore[arg-type]
    ],
)
def test_a_rank_whose_records_contradict_themselves_is_refused_and_the_others_of_its_stream_go_on(
    tmp_path: Path, message: pb.FromRecorder, says: str
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            place = pb.Topology(rank=1, world_size=2)
            await stream.send(hello(topology=pb.Topology(world_size=2)), hello(instance="wrong", topology=place))
            await stream.send(message, steps(1, [1.0], instance="wrong"), steps(1, [1.0, 2.0]))
            right, wrong = await stream.positions(2)
            while right.sequence < 2:
                right, wrong = await stream.positions(2)
            assert (right.refused, wrong.sequence) == ("", 0)
            assert says in wrong.refused
            assert value(await families(server), "foreshock_collector_refused", reason="invalid_value") == 1
            await stream.close()

    serving(test())


def test_a_rank_that_asks_is_answered_the_norms_of_the_attempt_before(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            asks: dict[str, Any] = {"capabilities": ["norm_history"]}
            await stream.send(hello(**asks))
            (first,) = await stream.positions(1)
            assert first.HasField("history") and first.history.count == 0
            await stream.send(steps(1, [2.0] * 40, learning_rate=[0.01] * 40), goodbye(40))
            while not first.closed:
                (first,) = await stream.positions(1)
            await stream.send(hello(instance="r-1", launch_id="m", **asks))
            _, second = await stream.positions(2)
            known = second.history
            assert (known.mean, known.recent) == pytest.approx((math.log(2), math.log(2)))
            assert (known.count, known.learning_rate) == (40, 0.01) and 0 < known.deviation < 0.25
            await stream.send(steps(1, [2.0], instance="r-1"))
            while second.sequence < 1:
                first, second = await stream.positions(2)
            assert not first.HasField("history") and not second.HasField("history")
            await stream.close()

    serving(test())


def test_a_rank_that_mirrors_its_run_is_told_the_newest_event_and_the_verdict(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(capabilities=["notice"]), steps(1, [2.0, 2.1] * 60))
            (position,) = await stream.positions(1)
            assert position.notice == ""
            await stream.send(steps(121, [90.0]))
            while not (position := (await stream.positions(1))[0]).notice:
                pass
            assert position.notice.startswith("Spike of the gradient norm at step 120: 90, usually 2.0")
            await stream.send(steps(122, [math.nan]))
            while (position := (await stream.positions(1))[0]).notice.startswith("Spike"):
                pass
            assert re.match(r"[A-Z][a-z ]+: .* step 121", position.notice)
            # Of a later attempt, nothing has happened yet.
            await stream.send(hello(instance="r-1", launch_id="m", capabilities=["notice"]))
            _, second = await stream.positions(2)
            assert not second.notice
            await stream.close()

    serving(test())


def test_a_rank_that_mirrors_nothing_is_not_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [2.0, 2.1] * 60), steps(121, [math.nan]))
            while (position := (await stream.positions(1))[0]).sequence < 121:
                pass
            assert not position.notice
            await stream.close()

    serving(test())


def test_a_message_of_a_kind_that_only_a_newer_recorder_knows_is_skipped_and_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            newer = bytes([15 << 3 | 2, 1, 0])  # field 15, one byte
            await stream.send(newer, hello(), newer, steps(1, [1.0, 2.0]))
            await stream.stored(2)
            assert value(await families(server), "foreshock_collector_skipped_messages") == 2
            await stream.close()

    serving(test())


def test_only_its_own_recorder_ends_or_writes_an_instance_whose_name_is_known(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            for run, token in (("with", "secret"), ("without", "")):
                ours, theirs = Stream(server), Stream(server)
                await ours.send(hello(run, launch_id=run, token=token), steps(1, [1.0], run=run))
                await ours.stored(1)
                goodbye = pb.Exit(instance=f"{run}-0", reason=pb.ExitReason.FINISHED, last_sequence=1000)
                await theirs.send(hello(run, launch_id=run, token="guess"), pb.FromRecorder(exit=goodbye))
                (position,) = await theirs.positions(1)
                assert position.refused
                await theirs.close()
                await ours.send(steps(2, [1.0], run=run))
                await ours.stored(2)
                await ours.close()
                again = Stream(server)
                while True:
                    await again.send(hello(run, launch_id=run, token=token))
                    (position,) = await again.positions(1)
                    if not position.refused:
                        break
                assert (position.sequence, position.closed) == (2, False)
                await again.close()

    serving(test())


def test_of_two_streams_only_one_sends_an_instance_of_an_older_agent_while_it_does(tmp_path: Path) -> None:
    clock, ours, theirs = Clock(), Session(), Session()
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), ours)
    intake.apply(hello(), theirs)
    assert theirs.refused == {"r-0": "another stream sends this instance"}
    # Half open: its recorder has opened another stream, and the end of this one is not known yet.
    clock.now += 11
    intake.apply(hello(), theirs)
    assert theirs.registered == {"r-0"}
    theirs.open = False
    intake.apply(hello(), ours)
    assert ours.registered == {"r-0"}
    store.close()


def test_a_compressed_message_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            good, bomb = Stream(server), Stream(server, compression=grpc.Compression.Gzip)
            await good.send(hello(), steps(1, [1.0]))
            await good.stored(1)
            with suppress(asyncio.InvalidStateError):  # refused already, by its first header
                await bomb.send(hello("bomb", clip="x" * 2**22))
            code, text = await bomb.refusal()
            assert code is grpc.StatusCode.UNIMPLEMENTED and "gzip" in text
            await good.send(steps(2, [1.0]))
            await good.stored(2)
            await good.close()
            await bomb.close()

    serving(test())


def test_a_token_is_stored_only_as_its_digest(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0)
    intake.apply(hello(token="the-secret-of-r-0"), Session())
    intake.commit()
    store.close()
    assert b"the-secret-of-r-0" not in (tmp_path / "db").read_bytes()
    store = Store(tmp_path / "db")
    intake, session = Intake(store.load(0.0), store, Clock(), ended_seconds=900.0, silent=900.0), Session()
    intake.apply(hello(token="another"), session)
    assert "another token" in session.refused["r-0"]
    intake.apply(hello(token="the-secret-of-r-0"), session)
    assert session.registered == {"r-0"}
    store.close()


def test_records_sent_again_count_once_and_a_gap_is_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            first = Stream(server)
            await first.send(hello(), steps(1, [1.0] * 10))
            await first.stored(10)
            await first.close()
            again = Stream(server)
            await again.send(hello(), steps(6, [1.0] * 10), steps(21, [1.0] * 5))
            await again.stored(25)
            # What fills a gap may come late.
            while value(found := await families(server), "foreshock_steps") < 20:
                await asyncio.sleep(0.05)
            await again.close()
            assert value(found, "foreshock_steps") == 20
            assert value(found, "foreshock_records_dropped", reason="ring_overrun") == 5

    serving(test())


def test_the_health_service_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server, grpc.aio.insecure_channel(server.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    serving(test())
