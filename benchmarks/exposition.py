"""Measures what one answer of /metrics costs: rendering and compression, by the number of series.

Runs in one process, without a network: simulated ranks are applied to a collector's state, and the registry is rendered
as the server does it. Prints how many series were rendered.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from benchmarks.load.simulated_ranks import Job
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.server import OBJECTS_PER_COLLECTION
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.rendering import Renderer

_ENDED_SECONDS = 900.0
_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds the cost of one answer, in seconds of processor time: the median of several."""

    ranks: int
    runs: int
    series: int
    render_seconds: float
    client_seconds: float
    """Of prometheus-client's renderer, for the same text."""
    gzip_seconds: float
    size: int
    """Bytes of text."""
    compressed: int


def measure(job: Job, repeats: int) -> Measured:
    """Fill a collector's state, and render it so many times."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    with tempfile.TemporaryDirectory() as folder:
        store, runs = Store(Path(folder) / "db"), Runs()
        try:
            intake = Intake(runs, store, time.time, ended_seconds=_ENDED_SECONDS, silent=_ENDED_SECONDS)
            streams = [(ranks, Session()) for ranks in job.streams()]
            for ranks, session in streams:
                for rank in ranks:
                    intake.apply(rank.hello(), session)
            registry = CollectorRegistry()
            series = RunSeries(runs, time.time, ended_seconds=_ENDED_SECONDS, silent=_ENDED_SECONDS)
            registry.register(series)
            renderer = Renderer((series,), CollectorRegistry())
            rendering, reference, compressing, body, compressed = [], [], [], b"", b""
            for _ in range(repeats):
                # New values each time: what has not changed is not rendered again.
                for ranks, session in streams:
                    for rank in ranks:
                        intake.apply(rank.batch(_STEPS, job.rate), session)
                intake.commit()
                start = time.process_time()
                generate_latest(registry)
                begun = time.process_time()
                body = renderer.render()
                rendered = time.process_time()
                compressed = gzip.compress(body, 1)
                compressing.append(time.process_time() - rendered)
                rendering.append(rendered - begun)
                reference.append(begun - start)
        finally:
            store.close()
    return Measured(
        ranks=job.ranks,
        runs=-(-job.ranks // job.ranks_per_run),
        series=sum(not line.startswith(b"#") for line in body.splitlines()),
        render_seconds=round(statistics.median(rendering), 4),
        client_seconds=round(statistics.median(reference), 4),
        gzip_seconds=round(statistics.median(compressing), 4),
        size=len(body),
        compressed=len(compressed),
    )


def main() -> int:
    """Measure each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exposition", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096], help="sizes, one after another")
    parser.add_argument("--per-run", type=int, default=64, help="ranks of a run")
    parser.add_argument("--repeats", type=int, default=5, help="answers for each size")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each size")
    options = parser.parse_args()
    if not options.json:
        sys.stdout.write(
            "| ranks | runs | series | render | prometheus-client | gzip | text | compressed |\n" + "| --- " * 8 + "|\n"
        )
    for ranks in options.ranks:
        job = Job(ranks=ranks, ranks_per_run=options.per_run, ranks_per_stream=8, rate=10.0)
        found = measure(job, options.repeats)
        if options.json:
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
        else:
            milliseconds = (found.render_seconds, found.client_seconds, found.gzip_seconds)
            sys.stdout.write(
                f"| {found.ranks:,} | {found.runs} | {found.series:,} "
                + "".join(f"| {seconds * 1e3:.0f} ms " for seconds in milliseconds)
                + f"| {found.size / 1e6:.1f} MB | {found.compressed / 1e6:.2f} MB |\n"
            )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
