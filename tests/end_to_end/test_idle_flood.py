"""Very many connections that say nothing, on both ports of a collector: others are served, and memory is bounded."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.collector_process import Collector
from tests.support.streams import Stream, hello, serving, steps

pytestmark = pytest.mark.integration

MANY = 1150
"""On each port: a first attack shut others out with so many."""
MOST_MIB = 64
"""That they may take together; 25 were measured."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
REQUEST = b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = {"nothing": (b"", b""), "half of a greeting": (PREFACE[:10], REQUEST[:20]), "a greeting": (PREFACE, REQUEST)}
"""What they send to the recorders' port, and over HTTP."""


@pytest.fixture(autouse=True)
def _files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def largest_mib(collector: Collector) -> float:
    status = Path(f"/proc/{collector.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
def test_idle_connections_on_both_ports_shut_nobody_out_and_cost_bounded_memory(
    collector: Collector, sent: tuple[bytes, bytes]
) -> None:
    async def test() -> None:
        known = Stream(collector)
        await known.send(hello("known", launch_id="known"), steps(1, [1.0] * 10, run="known"))
        await known.stored(10)
        before, idle = largest_mib(collector), list[asyncio.StreamWriter]()
        for _ in range(MANY):
            for address, data in zip((collector.address, collector.url), sent, strict=True):
                _, writer = await asyncio.open_connection("127.0.0.1", port(address))
                writer.write(data)
                idle.append(writer)
        new = Stream(collector)
        await new.send(hello("new", launch_id="new"), steps(1, [1.0] * 10, run="new"))
        await new.stored(10)
        await known.send(steps(11, [1.0] * 10, run="known"))
        await known.stored(20)
        assert "foreshock_collector_streams 2" in await asyncio.to_thread(collector.metrics)
        for run, count in (("known", 20), ("new", 10)):
            counters = (await asyncio.to_thread(collector.run, run))["counters"]
            assert counters["steps"] == count and not any(counters["dropped"].values())
            told = await asyncio.to_thread(collector.get, f"/api/v1/runs/{run}/steps")
            assert told["step"] == list(range(count))
        assert largest_mib(collector) - before < MOST_MIB
        for stream in (known, new):
            await stream.close()
        for writer in idle:
            with suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()

    serving(test())
    assert collector.stop() == 0
