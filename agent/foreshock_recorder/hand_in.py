"""`foreshock recorder`: hands in what jobs on this machine have left, now and with somebody watching."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from foreshock_recorder.address import address_of
from foreshock_recorder.folder import Contents, contents, lock
from foreshock_recorder.ring import ring_base

_LINGER_SECONDS = 10.0
"""Without a step forward: then the collector has had its chance."""
_PROGRESS_SECONDS = 2.0
_AT_ONCE = 8
_EPILOG = """
Jobs that end while their collector is away leave their records in shared memory, for a day at most. A later job's
recorder on this machine hands them in; so does this command, at once. Exit code: 0 if all is handed in, 1 if something
is left.
"""


@dataclass
class _Run:
    """What became of one run."""

    records: int = 0
    stored: int = 0
    left: list[str] = field(default_factory=list)
    """Why something stays."""
    pages: set[str] = field(default_factory=set)

    def line(self, name: str) -> str:
        if self.left:
            why = "; ".join(sorted(set(self.left)))
            return f"run {name}: {self.stored:,} of {self.records:,} records handed in; {why}"
        return f"run {name}: {', '.join((f'{self.records:,} records handed in', *sorted(self.pages)))}"


def main(arguments: list[str] | None = None) -> int:
    """Hand in all that lies below a folder. 0: nothing is left; 1: something is; 2: a wrong call."""
    parser = argparse.ArgumentParser(
        prog="foreshock recorder", description="Hand in the records that jobs have left.", epilog=_EPILOG
    )
    parser.add_argument("--dir", type=Path, default=None, help="where rings lie; default: where ranks put them")
    parser.add_argument("--collector", metavar="HOST:PORT", help="default: the one that each job was told")
    options = parser.parse_args(arguments)
    try:
        collector = None if options.collector is None else address_of(options.collector)
    except ValueError as error:
        parser.error(f"argument --collector: {error}")
    base = options.dir or ring_base()
    found = [contents(folder) for folder in sorted({path.parent for path in base.rglob("*.ring")})]
    launches = [each for each in found if each is not None]
    runs: defaultdict[str, _Run] = defaultdict(_Run)
    if launches:
        asyncio.run(_hand_in(launches, collector, runs))
    else:
        sys.stdout.write(f"there is nothing to hand in below {base}\n")
    for name, run in sorted(runs.items()):
        sys.stdout.write(run.line(name) + "\n")
    return int(any(run.left for run in runs.values()))


async def _hand_in(launches: list[Contents], collector: str | None, runs: defaultdict[str, _Run]) -> None:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(launch: Contents) -> None:
        async with turn:
            await _hand_in_one(launch, collector or address_of(launch.collector), runs[launch.run])

    await asyncio.gather(*(one(launch) for launch in launches))


async def _hand_in_one(launch: Contents, collector: str, run: _Run) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from foreshock_recorder.delivery import POLL_SECONDS, Delivery

    run.records += launch.unstored
    held = None if launch.alive else lock(launch.folder, patience=0.0)
    if held is None:
        run.left.append("its ranks still run" if launch.alive else "a recorder is at work on it")
        return
    delivery = Delivery(launch.folder, held, collector=collector, linger=_LINGER_SECONDS, empty=0.0)
    try:
        told = time.monotonic() + _PROGRESS_SECONDS
        while not delivery.over(time.monotonic()):
            await asyncio.sleep(POLL_SECONDS)
            if time.monotonic() >= told:
                told += _PROGRESS_SECONDS
                sys.stderr.write(f"run {launch.run}: {delivery.stored:,} of {launch.unstored:,} records\n")
        run.stored += delivery.stored
        if not delivery.empty:
            run.left.append(f"{delivery.unstored:,} are left ({delivery.trouble or 'no answer'})")
        if delivery.page:
            run.pages.add(delivery.page)
    finally:
        await delivery.close()
