"""Measures how fast `foreshock diagnose` reads and replays long logs, and how much memory that takes.

Prints rows per second and, as ratios within one run, the time relative to parsing the same file with the standard
library alone: `csv.DictReader`, `json.loads` per line, or one regular expression per line, with `float` for each value.
Each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from foreshock_collector.commands.logs import read_log
from foreshock_collector.commands.replay import replay


class Measured(NamedTuple):
    """Processor time and memory of one measurement."""

    read_seconds: float
    replay_seconds: float
    peak_mib: float
    """Largest resident memory of the process."""


FORMATS: dict[str, tuple[str, str]] = {
    "csv": ("step,loss,grad_norm,lr\n", "{},{:.6f},{:.6f},0.001\n"),
    "jsonl": ("", '{{"step": {}, "loss": {:.6f}, "grad_norm": {:.6f}, "lr": 0.001}}\n'),
    "text": ("", "step {}/1000000 | loss {:.6f} | norm {:.6f} | lr 1e-03 | 41.0% MFU\n"),
}
"""Header and line of each."""
_LINE = re.compile(r"step (\d+)/\d+ \| loss (\S+) \| norm (\S+) \| lr (\S+)")


def write(path: Path, header: str, line: str, rows: int, *, noisy: bool) -> None:
    """Write a log. noisy: with a spike in every 500 rows, which cannot be processed in blocks."""
    rng = random.Random(0)
    with path.open("w") as file:
        file.write(header)
        for step in range(rows):
            norm = math.exp(rng.gauss(0, 0.15)) * (30 if noisy and step % 500 == 499 else 1)
            file.write(line.format(step, 2 + math.exp(-step / 1e5) + 0.05 * rng.gauss(0, 1), norm))


def ours(path: Path) -> Measured:
    start = time.process_time()
    log = read_log(path)
    read = time.process_time()
    replay(log)
    return Measured(read - start, time.process_time() - read, _peak_mib())


def standard_library(path: Path) -> Measured:
    start = time.process_time()
    rows: list[Any] = []
    with path.open() as file:
        if path.suffix == ".csv":
            rows += [tuple(map(float, row.values())) for row in csv.DictReader(file)]
        elif path.suffix == ".jsonl":
            rows += [tuple(map(float, json.loads(line).values())) for line in file]
        else:
            rows += [tuple(map(float, found.groups())) for line in file if (found := _LINE.match(line))]
    assert rows
    return Measured(time.process_time() - start, 0.0, _peak_mib())


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(measure: Callable[[Path], Measured], path: Path) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (path,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object per measurement, one per line")
    options = parser.parse_args()
    if not options.json:
        print("log           read    replay   rows/s      memory    relative to the standard library's parsing")
    with tempfile.TemporaryDirectory() as folder:
        for name, noisy in [*((name, False) for name in FORMATS), ("csv", True)]:
            path = Path(folder) / f"log.{name}"
            write(path, *FORMATS[name], options.rows, noisy=noisy)
            mine, other = alone(ours, path), alone(standard_library, path)
            title = f"{name}, spikes" if noisy else name
            seconds = mine.read_seconds + mine.replay_seconds
            ratio = seconds / other.read_seconds
            if options.json:
                print(json.dumps({"log": title, "rows": options.rows, **mine._asdict(), "ratio": ratio}))
            else:
                times = f"{mine.read_seconds:6.2f} s {mine.replay_seconds:6.2f} s {options.rows / seconds:9,.0f}"
                print(f"{title:12} {times}  {mine.peak_mib:6.0f} MiB    {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
