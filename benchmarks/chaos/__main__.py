"""Break things at random moments under load, and count what was lost: `make chaos ARGS="--faults 100 --seed 7"`.

Ends with 1 if a step was lost that was not counted, stored twice, or counted twice; if a counter went back; if a
process or a ring was left; or if the median step took twice as long as before the first fault.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.fleet import come_back
from benchmarks.chaos.proxy import Proxy
from tests.support.collector_process import Collector
from tests.support.launched_jobs import recorders
from tests.support.waiting import eventually

RUN = "chaos"
_QUIET_STEPS = 2000
"""Steps before the first fault, whose times are the usual ones."""
_MOST_SLOWDOWN = 2.0
"""Of the median step, faults beside no faults: two cores do all this."""
_HOLD_SECONDS = 1.0
"""How long a process is stopped, a connection delayed or a database held."""


@dataclass
class Job:
    """Ranks that write steps, their recorder, a proxy, and a collector: what faults happen to."""

    folder: Path
    collector: Collector
    proxy: Proxy
    ranks: int = 0
    """Process of all ranks."""
    counters: dict[str, float] = field(default_factory=dict)
    regressions: int = 0

    @property
    def rings(self) -> Path:
        return self.folder / "rings"

    @property
    def database(self) -> Path:
        return self.folder / "foreshock.db"

    def recorder_pids(self) -> list[int]:
        return [int(pid) for pid in recorders(self.rings)]

    def look(self) -> float:
        """Scrape the collector: count what went back. Return the steps that it has counted."""
        with suppress(OSError):
            for family in text_string_to_metric_families(self.collector.metrics()):
                for sample in family.samples:
                    if family.type == "counter" and sample.labels.get("run") == RUN:
                        key = sample.name + json.dumps(sample.labels)
                        self.regressions += sample.value < self.counters.get(key, 0.0)
                        self.counters[key] = sample.value
        return sum(value for key, value in self.counters.items() if key.startswith("foreshock_steps_total"))


def _hold(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(_HOLD_SECONDS)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def kill_collector(job: Job) -> None:
    job.collector.kill_and_restart()


def stop_collector(job: Job) -> None:
    _hold([job.collector.process.pid])


def drain_collector(job: Job) -> None:
    job.collector.stop()
    job.collector.start()


def kill_recorder(job: Job) -> None:
    for pid in job.recorder_pids():
        os.kill(pid, signal.SIGKILL)


def stop_recorder(job: Job) -> None:
    _hold(job.recorder_pids())


def drain_recorder(job: Job) -> None:
    for pid in job.recorder_pids():
        os.kill(pid, signal.SIGTERM)


def stop_ranks(job: Job) -> None:
    _hold([job.ranks])


def cut_connections(job: Job) -> None:
    job.proxy.cut()


def delay_data(job: Job) -> None:
    job.proxy.delay(0.3)
    time.sleep(_HOLD_SECONDS)
    job.proxy.delay(0.0)


def swallow_data(job: Job) -> None:
    job.proxy.swallow(True)
    time.sleep(_HOLD_SECONDS)
    job.proxy.cut()
    job.proxy.swallow(False)


def hold_database(job: Job) -> None:
    with closing(sqlite3.connect(job.database, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        time.sleep(_HOLD_SECONDS)


FAULTS: dict[str, Callable[[Job], None]] = {
    "collector killed": kill_collector,
    "collector stopped for a second": stop_collector,
    "collector asked to end": drain_collector,
    "recorder killed": kill_recorder,
    "recorder stopped for a second": stop_recorder,
    "recorder asked to end": drain_recorder,
    "ranks stopped for a second": stop_ranks,
    "connections cut": cut_connections,
    "data delayed": delay_data,
    "data swallowed, then cut": swallow_data,
    "database held by another process": hold_database,
}


def run(
    folder: Path,
    names: Sequence[str],
    *,
    faults: int,
    seed: int,
    pace: float,
    quiet: int = 100,
    most_slowdown: float = math.inf,
) -> list[str]:
    """Run a job through so many of these faults and print the table. Return what was wrong.

    quiet: steps before the first fault. most_slowdown: of the median step, by the faults.
    """
    generator = random.Random(seed)
    collector = Collector(folder)
    proxy = Proxy(int(collector.address.rpartition(":")[2]))
    job = Job(folder, collector, proxy)
    stop, faulty = folder / "stop", folder / "faulty"
    launch = job.rings / RUN / "first"
    ranks = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.chaos.ranks", str(launch), f"127.0.0.1:{proxy.port}",
         "--pace", str(pace), "--stop", str(stop), "--faulty", str(faulty)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    job.ranks = ranks.pid
    eventually(lambda: job.look() >= quiet, "steps before the first fault")
    faulty.touch()
    counts: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(faults):
        name = names[number] if number < len(names) else generator.choice(names)
        before = job.look()
        # At a random moment, yet not before the last fault is over.
        eventually(lambda before=before: job.look() > before, f"steps after {sum(counts.values())} faults")  # type: ignore[misc]
        time.sleep(generator.random() / 2)
        FAULTS[name](job)
        counts[name] += 1
    before = job.look()
    eventually(lambda: job.look() > before, "steps after the last fault")
    stop.touch()
    assert ranks.stdout is not None
    said = json.loads(ranks.stdout.readline())
    steps = said["steps"]
    eventually(lambda: not list(launch.glob("*.ring")), "a delivery of all rings")
    eventually(lambda: job.look() >= steps, "all steps")
    ranks.wait()
    ranks.stdout.close()
    eventually(lambda: not job.recorder_pids(), "the end of the recorder")
    counted = int(job.look())
    seen = collector.run(RUN)
    dropped = sum(seen["counters"]["dropped"].values())
    collector.stop()
    proxy.close()
    with closing(sqlite3.connect(job.database)) as database:
        stored, distinct = database.execute("SELECT count(*), count(DISTINCT sequence) FROM steps").fetchone()
    left = [str(path.relative_to(folder)) for path in job.rings.rglob("*") if path.is_file()]
    print(f"\n{'fault':<36}{'times':>6}")
    for name in names:
        print(f"{name:<36}{counts[name]:>6}")
    print(f"{'in all':<36}{sum(counts.values()):>6}   seed {seed}, {time.monotonic() - began:.0f} s\n")
    lost, doubled = steps - distinct, counted - distinct + stored - distinct
    figures = {
        "steps sent": steps, "stored": stored, "lost": lost, "doubled": doubled, "records counted as dropped": dropped,
        "counter regressions": job.regressions, "rings and other files left": len(left),
    }  # fmt: skip
    for what, figure in figures.items():
        print(f"{what:<36}{figure:>6}")
    spreads = {name: [1e6 * seconds for seconds in said[name]] for name in ("quiet", "faulty")}
    print(f"\n{'a step of all ranks, in us':<36}{'median':>8}{'99 %':>8}{'99.9 %':>8}")
    for name, words in (("quiet", "before the first fault"), ("faulty", "with faults")):
        print(f"{words:<36}" + "".join(f"{each:>8.0f}" for each in spreads[name]))
    wrong = [f"{figures[what]} {what}" for what in ("doubled", "counter regressions") if figures[what]]
    if lost > dropped / 2:
        wrong.append(f"{lost} steps lost, and {dropped} records counted as dropped")
    slowdown = spreads["faulty"][0] / spreads["quiet"][0]
    if slowdown > most_slowdown:
        wrong.append(f"the median step takes {slowdown:.1f} times as long as before the first fault")
    return wrong + [f"left: {path}" for path in left]


def main() -> None:
    """Run, and end with 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.01, help="seconds between steps; default: 0.01")
    parser.add_argument("--recorders", type=int, default=1000, help="that come back at once; default: 1000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wrong = run(
            Path(name),
            list(FAULTS),
            faults=options.faults,
            seed=options.seed,
            pace=options.pace,
            quiet=_QUIET_STEPS,
            most_slowdown=_MOST_SLOWDOWN,
        )
    with tempfile.TemporaryDirectory() as name:
        wrong += come_back(Path(name), recorders=options.recorders)
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
