"""Raw streams of a recorder's messages into a real collector, and the series it answers with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foreshock_collector.config import Config
from foreshock_collector.ingest.service import Telemetry
from foreshock_collector.server import Server
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import WIRE_NAMES
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.waiting import WAIT_SECONDS


def hello(run: str = "r", **changes: Any) -> pb.FromRecorder:
    values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "instance": f"{run}-0", "run": run}
    values |= {"experiment": "e", "launch_id": "l", "topology": pb.Topology(world_size=1)}
    return pb.FromRecorder(hello=pb.Hello(**(values | changes)))


def steps(first: int, norms: list[float], *, run: str = "r", instance: str = "", **changes: Any) -> pb.FromRecorder:
    count = len(norms)
    batch = pb.StepBatch(
        instance=instance or f"{run}-0", first_sequence=first, step=range(first - 1, first - 1 + count)
    )
    for name in WIRE_NAMES:
        getattr(batch, name)[:] = batch.step if name == "step" else [0] * count
    batch.global_norm[:] = norms
    batch.clip_coefficient[:] = [1.0] * count
    batch.monotonic_seconds[:] = [0.1 * (first + i) for i in range(count)]
    for name, value in changes.items():
        getattr(batch, name)[:] = value
    return pb.FromRecorder(steps=batch)


def goodbye(last: int) -> pb.FromRecorder:
    return pb.FromRecorder(exit=pb.Exit(instance="r-0", reason=pb.ExitReason.FINISHED, last_sequence=last))


class Listening(Protocol):
    """A collector, in this process or in another."""

    @property
    def address(self) -> str: ...


class Stream:
    """A raw stream: messages go as bytes, so that wrong ones can too."""

    def __init__(
        self, server: Listening, *, token: str | None = None, compression: grpc.Compression | None = None
    ) -> None:
        self._channel = grpc.aio.insecure_channel(server.address, compression=compression)
        open_stream = self._channel.stream_stream(
            "/foreshock.v1.Telemetry/Stream", response_deserializer=pb.Ack.FromString
        )
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self.call = open_stream(metadata=metadata)

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


class Deaf:
    """Streams of one instance that never read: each acknowledgement is too long for their window."""

    def __init__(self, instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told = 0
        """Acknowledgements that the collector has begun to send."""
        acknowledge = Telemetry._ack

        def lengthy(telemetry: Telemetry, stream: Any) -> pb.Ack:
            ack = acknowledge(telemetry, stream)
            if instance in stream.session.registered:
                self.told += 1
                ack.page_url = "x" * 2**20
            return ack

        monkeypatch.setattr(Telemetry, "_ack", lengthy)

    async def stuck(self, reader: Stream, first: int, **changes: Any) -> int:
        """Let another stream send steps and be acknowledged until these are told no more. Return its next step."""
        told, step = -1, first
        while told != self.told or not told:
            told = self.told
            for _ in range(5):
                await reader.send(steps(step, [1.0], **changes))
                await reader.stored(step)
                step += 1
        return step


def serving(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_SECONDS))


def config(tmp_path: Path, **changes: Any) -> Config:
    return Config(grpc_port=0, http_port=0, database=str(tmp_path / "db"), ack_seconds=0.1, **changes)


async def families(server: Server) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        assert response.status == 200
        return {family.name: family for family in text_string_to_metric_families(await response.text())}


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    (sample,) = (s for s in found[name].samples if labels.items() <= s.labels.items())
    return float(sample.value)
