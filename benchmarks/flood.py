"""Measures what one machine that begins very many runs does to the run of another: `make bench-flood`.

An honest rank sends steps and waits for each acknowledgement, first alone and then while another peer begins runs as
fast as the collector takes them. Ends with 1 if a step of the honest rank was lost, or more runs were taken in than the
limit allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from benchmarks.load.pinned_collector import PinnedCollector, pinned_collector, separate_cores
from benchmarks.load.simulated_ranks import Rank
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub

_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
_RUNS_PER_STREAM = 100
_STEPS, _RATE = 10, 10.0
"""Steps of each message, and steps a second."""
_ALONE_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
"""For the last acknowledgement of all streams."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds what the flood did. Times are seconds from a message to its acknowledgement."""

    runs_begun: int
    runs_accepted: int
    median_alone: float
    median: float
    largest: float
    honest_sent: int
    honest_stored: int
    memory_mib: float
    """Largest resident memory of the collector."""


async def _honest(rank: Rank, address: str, waits: list[float], ends: asyncio.Event) -> None:
    """Send a message a second, each once the one before is acknowledged."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        call = TelemetryStub(channel).Stream()  # type: ignore[no-untyped-call]
        await call.write(rank.hello())
        while not ends.is_set():
            began = time.perf_counter()
            await call.write(rank.batch(_STEPS, _RATE))
            while rank.stored < rank.sent:
                rank.stored = max(rank.stored, *(each.sequence for each in (await call.read()).positions))
            waits.append(time.perf_counter() - began)
            with suppress(TimeoutError):
                await asyncio.wait_for(ends.wait(), max(0.0, _STEPS / _RATE - waits[-1]))
        call.cancel()


async def _begin(ranks: list[Rank], address: str) -> int:
    """Begin the runs of one stream. Return how many were accepted."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        call = TelemetryStub(channel).Stream()  # type: ignore[no-untyped-call]
        for rank in ranks:
            await call.write(rank.hello())
            await call.write(rank.batch(_STEPS, _RATE))
        async with asyncio.timeout(_ANSWER_SECONDS):
            while len(positions := (await call.read()).positions) < len(ranks):
                pass
        call.cancel()
        return sum(not each.refused for each in positions)


async def _measure(collector: PinnedCollector, runs: int) -> Measured:
    rank, waits, ends = Rank(run="honest", rank=0, world=1, layers=16), list[float](), asyncio.Event()
    honest = asyncio.create_task(_honest(rank, collector.address, waits, ends))
    await asyncio.sleep(_ALONE_SECONDS)
    alone = len(waits)
    flood = [Rank(run=f"flood{number}", rank=0, world=1, layers=16) for number in range(runs)]
    streams = [flood[first : first + _RUNS_PER_STREAM] for first in range(0, runs, _RUNS_PER_STREAM)]
    accepted = sum([await _begin(stream, collector.address) for stream in streams])
    ends.set()
    await honest
    return Measured(
        runs_begun=runs,
        runs_accepted=accepted,
        median_alone=statistics.median(waits[:alone]),
        median=statistics.median(waits[alone:]),
        largest=max(waits[alone:]),
        honest_sent=rank.sent,
        honest_stored=rank.stored,
        memory_mib=collector.memory_mib(),
    )


def flood(runs: int, *arguments: str) -> Measured:
    """Begin so many runs from one peer. arguments: flags of the collector."""
    core, _ = separate_cores()
    with tempfile.TemporaryDirectory() as name, pinned_collector(Path(name), core, *arguments) as collector:
        return asyncio.run(_measure(collector, runs))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12_000, help="default: 12000")
    parser.add_argument("--most-runs", type=int, default=1000, help="of the collector; one peer may have half of them")
    parser.add_argument("--json", action="store_true", help="one object")
    options = parser.parse_args()
    found = flood(options.runs, f"--most-runs={options.most_runs}")
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        print(f"{found.runs_begun:,} runs begun by one peer, {found.runs_accepted:,} accepted")
        print(f"honest rank: {found.honest_stored:,} of {found.honest_sent:,} steps stored")
        print(f"  acknowledged after {found.median_alone:.2f} s alone (median), {found.median:.2f} s beside them")
        print(f"  at most {found.largest:.2f} s")
        print(f"collector: {found.memory_mib:,.0f} MiB")
    sys.exit(found.honest_stored < found.honest_sent or found.runs_accepted > options.most_runs // 2)


if __name__ == "__main__":
    main()
