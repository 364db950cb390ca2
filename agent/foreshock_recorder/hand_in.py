"""`foreshock recorder`: delivers the records that jobs on this machine have left, at once and with progress lines."""

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
from foreshock_recorder.paths import SHARED_MEMORY, ring_base, temporary_base

_LINGER_SECONDS = 10.0
"""How long to try without progress."""
_PROGRESS_SECONDS = 2.0
_CONCURRENT = 8
_EPILOG = """
Jobs that end while their collector is down leave their records in shared memory, for a day at most. A later job's
recorder on this machine delivers them; so does this command, at once. Exit code: 0 if everything is delivered, 1 if
something is left, 2 for wrong usage.
"""


@dataclass
class _Result:
    """Counts what was delivered of one run, and says why the rest was not."""

    records: int = 0
    acknowledged: int = 0
    failures: list[str] = field(default_factory=list)
    """Why records stay."""
    pages: set[str] = field(default_factory=set)

    def line(self, name: str) -> str:
        if self.failures:
            why = "; ".join(sorted(set(self.failures)))
            return f"run {name}: {self.acknowledged:,} of {self.records:,} records delivered; {why}"
        return f"run {name}: {', '.join((f'{self.records:,} records delivered', *sorted(self.pages)))}"


def main(arguments: list[str] | None = None) -> int:
    """Deliver everything below a folder. Exit code 0: nothing is left; 1: something is; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="foreshock recorder", description="Deliver the records that jobs have left.", epilog=_EPILOG
    )
    parser.add_argument(
        "--dir", metavar="FOLDER", type=Path, help="folder to search for rings; default: where ranks put them"
    )
    parser.add_argument("--collector", metavar="HOST:PORT", help="default: the address that each job was given")
    options = parser.parse_args(arguments)
    try:
        collector = None if options.collector is None else address_of(options.collector)
    except ValueError as error:
        parser.error(f"argument --collector: {error}")
    base = options.dir or ring_base()
    # Where shared memory was full, rings are in the temporary folder.
    bases = (base, temporary_base()) if SHARED_MEMORY in base.parents and not options.dir else (base,)
    found = [contents(folder) for folder in sorted({path.parent for each in bases for path in each.rglob("*.ring")})]
    launches = [each for each in found if each is not None]
    results: defaultdict[str, _Result] = defaultdict(_Result)
    if launches:
        asyncio.run(_deliver(launches, collector, results))
    else:
        sys.stdout.write(f"nothing to deliver below {base}\n")
    for name, result in sorted(results.items()):
        sys.stdout.write(result.line(name) + "\n")
    return int(any(result.failures for result in results.values()))


async def _deliver(launches: list[Contents], collector: str | None, results: defaultdict[str, _Result]) -> None:
    slots = asyncio.Semaphore(_CONCURRENT)

    async def one(launch: Contents) -> None:
        async with slots:
            await _deliver_one(launch, collector or address_of(launch.collector), results[launch.run])

    await asyncio.gather(*(one(launch) for launch in launches))


async def _deliver_one(launch: Contents, collector: str, result: _Result) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from foreshock_recorder.delivery import POLL_SECONDS, Delivery

    result.records += launch.unacknowledged
    held = None if launch.alive else lock(launch.folder, patience=0.0)
    if held is None:
        result.failures.append("its ranks are still running" if launch.alive else "another recorder is delivering them")
        return
    delivery = Delivery(launch.folder, held, collector=collector, linger=_LINGER_SECONDS, empty=0.0)
    try:
        next_line = time.monotonic() + _PROGRESS_SECONDS
        while not delivery.poll(time.monotonic()):
            await asyncio.sleep(POLL_SECONDS)
            if time.monotonic() >= next_line:
                next_line += _PROGRESS_SECONDS
                sys.stderr.write(f"run {launch.run}: {delivery.acknowledged:,} of {launch.unacknowledged:,} records\n")
        result.acknowledged += delivery.acknowledged
        if not delivery.empty:
            result.failures.append(f"{delivery.unacknowledged:,} are left ({delivery.problem or 'no answer'})")
        if delivery.page:
            result.pages.add(delivery.page)
    finally:
        await delivery.close()
