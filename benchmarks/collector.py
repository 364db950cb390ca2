"""Measures what a collector takes of its core, its memory and its disk, under simulated ranks over the real wire.

The collector has a core of its own; the ranks' messages come from another one. Prints for each size how many steps were
sent, received and acknowledged, that is stored. A figure of a run that lost steps, or whose sender fell behind, is
marked: it is not that of the load that was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.load.pinned_collector import PinnedCollector, Scrape, pinned_collector, separate_cores
from benchmarks.load.simulated_ranks import Job, SimulatedRecorder

_WARM_UP_SECONDS = 3.0
"""Before the collector's processor time is counted: streams open, and columns grow for the first time."""
_SCRAPE_SECONDS = 5.0
_STREAMS_PER_SECOND = 500
"""How fast streams are opened."""
_LINGER_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds what one load cost."""

    ranks: int
    ranks_per_run: int
    ranks_per_stream: int
    rate: float
    seconds: float
    sent: int
    """Steps of single ranks, as are the next two."""
    received: int
    """As the collector counts them, repeated ones included."""
    stored: int
    """Acknowledged."""
    core_share: float
    """Of the collector's core, from the warm-up to the last message."""
    microseconds_per_step: float
    """Of the collector's processor time, for each step of a rank."""
    memory_mib: float
    """Largest resident memory."""
    bytes_per_step: float
    """Of the database and its write-ahead log, for each step of a rank."""
    scrapes: list[Scrape]
    series: int
    refusals: int
    """Streams that were told to come again later."""
    failures: list[str]
    """Why streams ended early."""
    valid: bool
    """All was sent in time, and stored."""


async def _measure(job: Job, seconds: float, collector: PinnedCollector) -> Measured:
    recorders = [SimulatedRecorder(ranks=ranks) for ranks in job.streams()]
    start = time.time() + 2.0 + len(recorders) / _STREAMS_PER_SECOND
    running = [
        asyncio.create_task(recorder.run(collector.address, job, start=start, seconds=seconds, linger=_LINGER_SECONDS))
        for recorder in recorders
    ]
    scrapes: list[Scrape] = []
    scraping = asyncio.create_task(_scrape(collector, scrapes))
    await asyncio.sleep(start + _WARM_UP_SECONDS - time.time())
    cpu, clock, sent = collector.cpu_seconds(), time.monotonic(), _sent(recorders)
    await asyncio.sleep(start + seconds - time.time())
    cpu = collector.cpu_seconds() - cpu
    clock = time.monotonic() - clock
    sent = _sent(recorders) - sent
    await asyncio.gather(*running)
    scraping.cancel()
    total, stored = _sent(recorders), sum(rank.stored for recorder in recorders for rank in recorder.ranks)
    failures = sorted({recorder.failure for recorder in recorders if recorder.failure})
    wanted = job.ranks * job.rate * clock
    return Measured(
        ranks=job.ranks,
        ranks_per_run=job.ranks_per_run,
        ranks_per_stream=job.ranks_per_stream,
        rate=job.rate,
        seconds=seconds,
        sent=total,
        received=collector.records_received(),
        stored=stored,
        core_share=round(cpu / clock, 3),
        microseconds_per_step=round(1e6 * cpu / max(1, sent), 1),
        memory_mib=round(collector.memory_mib()),
        bytes_per_step=round(collector.file_bytes() / max(1, stored)),
        scrapes=scrapes,
        series=sum(not line.startswith("#") for line in collector.metrics().splitlines()),
        refusals=sum(recorder.refusals for recorder in recorders),
        failures=failures,
        valid=stored == total and not failures and sent > 0.9 * wanted,
    )


def _sent(recorders: list[SimulatedRecorder]) -> int:
    return sum(rank.sent for recorder in recorders for rank in recorder.ranks)


async def _scrape(collector: PinnedCollector, scrapes: list[Scrape]) -> None:
    while True:
        await asyncio.sleep(_SCRAPE_SECONDS)
        scrapes.append(await asyncio.to_thread(collector.scrape))


def measure(job: Job, seconds: float) -> Measured:
    """Start a collector, send it a load for so many seconds, and return what it cost."""
    core, ours = separate_cores()
    before = os.sched_getaffinity(0)
    # One machine may begin half of them.
    most_runs = f"--most-runs={max(1000, 2 * job.runs)}"
    with tempfile.TemporaryDirectory() as folder, pinned_collector(Path(folder), core, most_runs) as collector:
        os.sched_setaffinity(0, {ours})
        try:
            return asyncio.run(_measure(job, seconds, collector))
        finally:
            os.sched_setaffinity(0, before)


def _table(found: list[Measured]) -> str:
    lines = [
        "| ranks | per run | per stream | sent/s | stored | core | µs a step | MiB | bytes a step | slowest scrape |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        slowest = max((scrape.seconds for scrape in each.scrapes), default=0.0)
        lines.append(
            f"| {each.ranks:,} | {each.ranks_per_run} | {each.ranks_per_stream} | {each.sent / each.seconds:,.0f} "
            f"| {each.stored / max(1, each.sent):.1%} | {each.core_share:.0%} | {each.microseconds_per_step:g} "
            f"| {each.memory_mib:g} | {each.bytes_per_step:g} | {slowest:.2f} s |{'' if each.valid else ' not valid'}"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure each size. Return 1 if steps were lost, or could not be sent as fast as they should have been."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collector", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="sizes, one after another")
    parser.add_argument("--per-run", type=int, default=64, help="ranks of a run")
    parser.add_argument("--per-stream", type=int, default=8, help="ranks of a recorder")
    parser.add_argument("--rate", type=float, default=10.0, help="steps a second of each rank")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--batches", action="store_true", help="a message for each rank, as version 0.1.0 sends")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each size")
    options = parser.parse_args()
    if options.seconds <= _WARM_UP_SECONDS:
        parser.error(f"--seconds must be more than {_WARM_UP_SECONDS:g}")
    found = []
    for ranks in options.ranks:
        job = Job(
            ranks=ranks,
            ranks_per_run=options.per_run,
            ranks_per_stream=options.per_stream,
            rate=options.rate,
            blocks=not options.batches,
        )
        found.append(measure(job, options.seconds))
        if options.json:
            sys.stdout.write(json.dumps(asdict(found[-1])) + "\n")
            sys.stdout.flush()
    if not options.json:
        sys.stdout.write(_table(found))
    return int(not all(each.valid for each in found))


if __name__ == "__main__":
    sys.exit(main())
