"""Measures how long a non-finite step takes from a rank's stream to /metrics, under the load of other ranks.

Each trial sends one run whose third step is NaN, while simulated ranks keep the collector busy, and asks for /metrics
until its incident is there. Prints how many incidents were seen; a trial without one counts as lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from benchmarks.load.pinned_collector import PinnedCollector, pinned_collector, separate_cores
from benchmarks.load.simulated_ranks import Job, Rank, SimulatedRecorder
from foreshock_collector.catalogue import INCIDENT_INFO
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub

_WARM_UP_SECONDS = 3.0
_STREAMS_PER_SECOND = 500
_TRIAL_SECONDS = 20.0
"""After which an incident counts as lost."""
_POLL_SECONDS = 0.02
_LINGER_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds the delays of all trials, in seconds."""

    ranks: int
    trials: int
    seen: int
    median: float
    percentile_99: float
    largest: float
    background_sent: int
    """Steps of the other ranks."""
    background_stored: int


async def _trial(collector: PinnedCollector, number: int) -> float | None:
    """Return the seconds from the write of a NaN to the answer that has its incident; None if none had."""
    rank = Rank(run=f"trial{number}", rank=0, world=1, layers=16)
    async with grpc.aio.insecure_channel(collector.address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        call = TelemetryStub(channel).Stream()  # type: ignore[no-untyped-call]
        await call.write(rank.hello())
        await call.write(rank.batch(2, 10.0))
        await call.read()
        start = time.perf_counter()
        await call.write(rank.batch(1, 10.0, nonfinite=True))
        wanted = f'run="{rank.run}"'
        while (waited := time.perf_counter() - start) < _TRIAL_SECONDS:
            text = await asyncio.to_thread(collector.metrics)
            if any(line.startswith(INCIDENT_INFO.name + "{") and wanted in line for line in text.splitlines()):
                return time.perf_counter() - start
            await asyncio.sleep(_POLL_SECONDS)
        assert waited >= _TRIAL_SECONDS
    return None


async def _measure(job: Job, trials: int, seconds: float, collector: PinnedCollector) -> Measured:
    recorders = [SimulatedRecorder(ranks=ranks) for ranks in job.streams()]
    start = time.time() + 1.0 + len(recorders) / _STREAMS_PER_SECOND
    running = [
        asyncio.create_task(recorder.run(collector.address, job, start=start, seconds=seconds, linger=_LINGER_SECONDS))
        for recorder in recorders
    ]
    await asyncio.sleep(start + _WARM_UP_SECONDS - time.time())
    delays: list[float] = []
    done = 0
    while done < trials and time.time() < start + seconds:
        delay = await _trial(collector, done)
        done += 1
        if delay is not None:
            delays.append(delay)
    await asyncio.gather(*running)
    delays.sort()
    return Measured(
        ranks=job.ranks,
        trials=done,
        seen=len(delays),
        median=round(statistics.median(delays), 3) if delays else float("inf"),
        percentile_99=round(delays[min(len(delays) - 1, int(0.99 * len(delays)))], 3) if delays else float("inf"),
        largest=round(delays[-1], 3) if delays else float("inf"),
        background_sent=sum(rank.sent for recorder in recorders for rank in recorder.ranks),
        background_stored=sum(rank.stored for recorder in recorders for rank in recorder.ranks),
    )


def main() -> int:
    """Measure one load. Return 1 if an incident was not seen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1000, help="ranks of the other runs")
    parser.add_argument("--per-run", type=int, default=64, help="ranks of one of these runs")
    parser.add_argument("--rate", type=float, default=10.0, help="steps a second of each of these ranks")
    parser.add_argument("--trials", type=int, default=30, help="non-finite steps, one after another")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the load, which limits the trials")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args()
    job = Job(ranks=options.ranks, ranks_per_run=options.per_run, ranks_per_stream=8, rate=options.rate)
    core, ours = separate_cores()
    with tempfile.TemporaryDirectory() as folder, pinned_collector(Path(folder), core) as collector:
        os.sched_setaffinity(0, {ours})
        found = asyncio.run(_measure(job, options.trials, options.seconds, collector))
    if options.json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    else:
        sys.stdout.write(
            f"{found.seen} of {found.trials} incidents seen beside {found.ranks:,} ranks: median {found.median:.2f} s, "
            f"99th percentile {found.percentile_99:.2f} s, largest {found.largest:.2f} s\n"
        )
    return int(found.seen < found.trials or not found.trials)


if __name__ == "__main__":
    sys.exit(main())
