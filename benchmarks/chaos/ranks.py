"""Ranks without torch: they write their rings at a steady pace, as a training would, and keep a recorder running."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring
from tests.support.rings import make_ring, step


def write(folder: Path, collector: str, *, ranks: int, pace: float, stop: Path, faulty: Path) -> None:
    """Write steps until a file appears, then leave. Prints how many, and how long they took: JSON.

    faulty: file that appears before the first fault: steps before it are told apart.
    """
    rings = [make_ring(folder, rank, run=folder.parent.name, world_size=ranks) for rank in range(ranks)]
    recorder = RecorderProcess(folder, run=folder.parent.name, collector=collector, python="", logs=False)
    recorder.ensure()
    durations: dict[str, list[float]] = {"quiet": [], "faulty": []}
    phase, sequence, due = "quiet", 0, time.monotonic()
    looked = 0.0
    while not stop.exists():
        sequence += 1
        began = time.perf_counter()
        for ring in rings:
            step(ring, sequence)
        durations[phase].append(time.perf_counter() - began)
        due = max(due + pace, time.monotonic() - 1.0)
        if (now := time.monotonic()) - looked > 0.5:
            looked = now
            phase = "faulty" if faulty.exists() else "quiet"
            _replace(recorder, rings[0], now)
        time.sleep(max(0.0, due - time.monotonic()))
    for ring in rings:
        ring.write_exit(ExitReason.FINISHED)
    print(json.dumps({"steps": sequence, **{name: _spread(each) for name, each in durations.items()}}), flush=True)
    deadline = time.monotonic() + 60
    while any(ring.path.exists() for ring in rings) and time.monotonic() < deadline:
        _replace(recorder, rings[0], time.monotonic())
        time.sleep(0.5)


def _replace(recorder: RecorderProcess, ring: Ring, now: float) -> None:
    """Do at once what a rank does every few seconds, however often the recorder is killed."""
    recorder._starts = 0
    recorder.checked = 0.0
    if ring.path.exists():
        recorder.ensure()
    recorder._reap()


def _spread(durations: list[float]) -> list[float]:
    """Return the median, and what 99 % and 99.9 % are below."""
    ordered = sorted(durations)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 0.999)]


def unacknowledged(folder: Path) -> int:
    """Return how many records of a folder no collector has acknowledged."""
    count = 0
    for path in folder.glob("*.ring"):
        reader = RingReader(path)
        count += reader.begun - reader.acknowledged
        reader.close()
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("collector")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.01)
    parser.add_argument("--stop", type=Path, required=True)
    parser.add_argument("--faulty", type=Path, required=True)
    options = parser.parse_args()
    write(
        options.folder,
        options.collector,
        ranks=options.ranks,
        pace=options.pace,
        stop=options.stop,
        faulty=options.faulty,
    )
