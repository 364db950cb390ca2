"""Very many wrong requests on both ports of a collector: its log stays short, and others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.collector_process import Collector
from tests.support.streams import Stream, hello, serving, steps

pytestmark = pytest.mark.integration

MANY = 400
"""Of each kind, four times as many as a log has lines of a kind in a minute."""
MOST_BYTES = 256 * 1024
WRONG = {
    "a header without end": b"GET / HTTP/1.1\r\nHost: " + b"x" * 20_000 + b"\r\n\r\n",
    "no length": b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
    "no path": b"GET /\xff\x00\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    """One whose log is a file."""
    started = Collector(tmp_path, log="log")
    yield started
    if started.process.poll() is None:
        started.stop()


async def request(port: int, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        assert b" 400 " in await reader.readline()
    finally:
        writer.close()


@pytest.mark.parametrize("sent", WRONG.values(), ids=WRONG)
def test_wrong_requests_make_few_lines(collector: Collector, tmp_path: Path, sent: bytes) -> None:
    async def test() -> None:
        port = int(collector.url.rpartition(":")[2])
        for _ in range(MANY):
            await request(port, sent)

    serving(test())
    assert collector.stop() == 0
    said = (tmp_path / "log").read_text()
    assert said.count(" WARNING refused a request of 127.0.0.1: 400") == 100
    assert "Traceback" not in said and all(line.isprintable() for line in said.splitlines())
    assert len(said.encode()) < MOST_BYTES


def test_refused_ranks_and_streams_make_few_lines(collector: Collector, tmp_path: Path) -> None:
    async def test() -> None:
        good, bad = Stream(collector), Stream(collector)
        await good.send(hello(), steps(1, [1.0]))
        await good.stored(1)
        for number in range(MANY):
            place = pb.Topology(rank=2, world_size=1, node="n" * 10_000)
            await bad.send(hello("x" * 10_000, instance=f"x{number}", topology=place))
        await bad.positions(MANY)
        for _ in range(MANY):
            garbage = Stream(collector)
            await garbage.send(b"\xff")
            await garbage.refusal()
            await garbage.close()
        await good.send(steps(2, [1.0]))
        await good.stored(2)
        for stream in (good, bad):
            await stream.close()

    serving(test())
    assert collector.stop() == 0
    said = (tmp_path / "log").read_text()
    assert "refused rank 2 of run" in said and "refused the stream of" in said
    assert len(said.encode()) < MOST_BYTES
