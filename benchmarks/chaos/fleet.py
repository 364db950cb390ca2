"""Many recorders that lose their collector at the same moment, and are back at once when it is."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.load.block_messages import block_of
from foreshock_collector.server import allow_open_files
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.collector_process import Collector
from tests.support.streams import hello, steps
from tests.support.waiting import WAIT_SECONDS

_RANKS = 100
"""Recorders of a run, each of a machine with one rank."""
_STEPS = 100
"""Steps before the collector is killed, and as many after."""
_MOST_SECONDS = 5 * WAIT_SECONDS
"""For all of them to deliver: only what hangs takes longer."""
_CHANNEL = (("grpc.use_local_subchannel_pool", 1),)
"""Each recorder has a connection of its own."""


@dataclass
class _Recorder:
    address: str
    run: str
    rank: int
    ranks: int
    stored: int = 0

    async def deliver(self, upto: int) -> None:
        """Send steps up to one, on as many streams as that takes, until all are acknowledged."""
        while self.stored < upto:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with grpc.aio.insecure_channel(self.address, options=_CHANNEL) as channel:
                    await self._stream(channel, upto)
            if self.stored < upto:
                await asyncio.sleep(random.random())

    async def _stream(self, channel: grpc.aio.Channel, upto: int) -> None:
        path = "/foreshock.v1.Telemetry/Stream"
        call = channel.stream_stream(path, response_deserializer=pb.Ack.FromString)()
        instance = f"{self.run}-{self.rank}"
        place = pb.Topology(rank=self.rank, world_size=self.ranks, node=f"node-{self.rank}")
        first = self.stored + 1
        batch = steps(first, [1.0] * (upto - self.stored), instance=instance).steps
        for message in (
            hello(self.run, instance=instance, launch_id=self.run, topology=place),
            pb.FromRecorder(block=block_of([batch])),
        ):
            await call.write(message.SerializeToString())
        while self.stored < upto:
            ack = await call.read()
            if ack is grpc.aio.EOF or any(each.refused for each in ack.positions):
                break  # to the collector, its last stream is still open
            self.stored = max([self.stored, *(each.sequence for each in ack.positions)])
        call.cancel()


def come_back(folder: Path, *, recorders: int) -> list[str]:
    """Kill the collector of so many recorders, let all come back, and print how long it took. Return what was wrong."""
    allow_open_files()
    collector = Collector(folder)
    sizes = {f"fleet-{first // _RANKS}": min(_RANKS, recorders - first) for first in range(0, recorders, _RANKS)}
    fleet = [_Recorder(collector.address, run, rank, size) for run, size in sizes.items() for rank in range(size)]

    async def deliver(upto: int) -> float:
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(_MOST_SECONDS):
                await asyncio.gather(*(recorder.deliver(upto) for recorder in fleet))
        return time.monotonic() - began

    before = asyncio.run(deliver(_STEPS))
    collector.kill_and_restart()
    after = asyncio.run(deliver(2 * _STEPS))
    counters = {run: collector.run(run)["counters"] for run in sizes}
    collector.stop()
    print(f"\n{recorders} recorders: all stored after {before:.1f} s, and {after:.1f} s after the collector was killed")
    late = sum(recorder.stored < 2 * _STEPS for recorder in fleet)
    wrong = [f"{late} recorders were not acknowledged all of their steps"] if late else []
    wrong += [f"{run} counts {each['steps']} steps" for run, each in counters.items() if each["steps"] != 2 * _STEPS]
    lost = {run: sum(each["dropped"].values()) for run, each in counters.items()}
    return wrong + [f"{run} has lost {count} records" for run, count in lost.items() if count]
