"""Ranks without torch: they write their rings at a steady pace, as a training would, and keep a recorder running.

Beside each step they write the same step into rings that nobody reads. What delays both alike is the machine.
"""

from __future__ import annotations

import argparse
import secrets
import struct
import time
from pathlib import Path

from benchmarks.chaos.ledger import RANKS
from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_name
from foreshock_recorder.ring import Ring
from tests.support.rings import LAYERS, identity, step

UNREAD_SUFFIX = ".unread"
"""Of the files of rings that no recorder finds."""


def write(folder: Path, collector: str, *, ranks: int, pace: float, stop: Path, durations: Path) -> None:
    """Write steps until a file appears, then leave.

    durations: file that gets the seconds of each finished step, then those of the step that nobody reads, as float64:
    all that a killed job leaves behind.
    """
    launch = folder.name
    place = {"run": folder.parent.name, "launch_id": launch, "started_seconds": time.time(), "world_size": ranks}
    paths = [folder / ring_name(launch, rank) for rank in range(ranks)]
    identities = [
        identity(rank, instance=f"{launch}-{rank}", token=secrets.token_hex(16), **place) for rank in range(ranks)
    ]
    rings, unread = (
        [
            Ring.create(path.with_suffix(suffix), each, layers=LAYERS)
            for path, each in zip(paths, identities, strict=True)
        ]
        for suffix in (paths[0].suffix, UNREAD_SUFFIX)
    )
    recorder = RecorderProcess(folder, run=folder.parent.name, collector=collector, python="", logs=False)
    recorder.ensure()
    sequence, due, looked = 0, time.monotonic(), 0.0
    with durations.open("wb", buffering=0) as file:
        while not stop.exists():
            sequence += 1
            # In turns, since whoever comes second finds the code in the caches.
            first, second = (rings, unread) if sequence % 2 else (unread, rings)
            took = [_write_step(first, sequence), _write_step(second, sequence)]
            file.write(struct.pack("2d", *(took if sequence % 2 else reversed(took))))
            due = max(due + pace, time.monotonic() - 1.0)
            if (now := time.monotonic()) - looked > 0.5:
                looked = now
                _replace(recorder, rings[0], now)
            time.sleep(max(0.0, due - time.monotonic()))
    for ring in unread:
        ring.path.unlink()
    for ring in rings:
        ring.write_exit(ExitReason.FINISHED)
    deadline = time.monotonic() + 60
    while any(ring.path.exists() for ring in rings) and time.monotonic() < deadline:
        _replace(recorder, rings[0], time.monotonic())
        time.sleep(0.5)


def _write_step(rings: list[Ring], sequence: int) -> float:
    """Write a step of all ranks. Return how long that took, in seconds."""
    began = time.perf_counter()
    for ring in rings:
        step(ring, sequence)
    return time.perf_counter() - began


def _replace(recorder: RecorderProcess, ring: Ring, now: float) -> None:
    """Do at once what a rank does every few seconds, however often the recorder is killed."""
    recorder._starts = 0
    recorder.checked = 0.0
    if ring.path.exists():
        recorder.ensure()
    recorder._reap()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("collector")
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--pace", type=float, default=0.01)
    parser.add_argument("--stop", type=Path, required=True)
    parser.add_argument("--durations", type=Path, required=True)
    options = parser.parse_args()
    write(
        options.folder,
        options.collector,
        ranks=options.ranks,
        pace=options.pace,
        stop=options.stop,
        durations=options.durations,
    )
