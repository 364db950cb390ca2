"""Streams into a real server on port 0: refusals, duplicates, gaps, series."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, families, hello, serving, steps, value


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        ([b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "not a foreshock.v1.FromRecorder"),
        ([hello("x", schema_version=99)], grpc.StatusCode.FAILED_PRECONDITION, "schema version 99"),
        ([hello("x", instance="")], grpc.StatusCode.INVALID_ARGUMENT, "hello.instance"),
        (
            [hello("x"), pb.FromRecorder(exit=pb.Exit(instance="x-0", last_sequence=2**64 - 1))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "exit.last_sequence",
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
        ({"launch_id": "l" * 500}, "hello.launch_id"),
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


def test_the_health_service_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server, grpc.aio.insecure_channel(server.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    serving(test())
