"""Ranks without torch: they write their rings at a steady pace, as a training would, and keep a recorder running."""

from __future__ import annotations

import argparse
import secrets
import struct
import time
from pathlib import Path

from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_name
from foreshock_recorder.ring import Ring
from tests.support.rings import LAYERS, identity, step


def write(folder: Path, collector: str, *, ranks: int, pace: float, stop: Path, durations: Path) -> None:
    """Write steps until a file appears, then leave.

    durations: file that gets the seconds of each finished step, as float64: all that a killed job leaves behind.
    """
    launch = folder.name
    place = {"run": folder.parent.name, "launch_id": launch, "started_seconds": time.time(), "world_size": ranks}
    rings = [
        Ring.create(
            folder / ring_name(launch, rank),
            identity(rank, instance=f"{launch}-{rank}", token=secrets.token_hex(16), **place),
            layers=LAYERS,
        )
        for rank in range(ranks)
    ]
    recorder = RecorderProcess(folder, run=folder.parent.name, collector=collector, python="", logs=False)
    recorder.ensure()
    sequence, due, looked = 0, time.monotonic(), 0.0
    with durations.open("wb", buffering=0) as file:
        while not stop.exists():
            sequence += 1
            began = time.perf_counter()
            for ring in rings:
                step(ring, sequence)
            file.write(struct.pack("d", time.perf_counter() - began))
            due = max(due + pace, time.monotonic() - 1.0)
            if (now := time.monotonic()) - looked > 0.5:
                looked = now
                _replace(recorder, rings[0], now)
            time.sleep(max(0.0, due - time.monotonic()))
    for ring in rings:
        ring.write_exit(ExitReason.FINISHED)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("collector")
    parser.add_argument("--ranks", type=int, default=2)
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
