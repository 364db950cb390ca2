"""Rings as a rank without torch writes them: identities, and records whose values tell where they belong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_name
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring

LAYERS = 2
FIRST, SECOND = "first-0-abcd", "first-1-abcd"
"""Instances of ranks 0 and 1."""


def identity(rank: int = 0, **changes: Any) -> dict[str, Any]:
    """What the probe writes into the header of its ring."""
    return {
        "schema_version": 1,
        "instance": f"first-{rank}-abcd",
        "experiment": "digits",
        "run": "crimson-otter",
        "launch_id": "first",
        "started_seconds": 1.7e9,
        "rank": rank,
        "local_rank": rank,
        "world_size": 2,
        "node": "node-7",
        "clip": "norm 1.0",
        "capabilities": ["local_norms"],
        "versions": {"foreshock": "0.1.0"},
        "model": {
            "type": "Net",
            "module_types": {"Linear": 2},
            "parameters": ["a.weight", "b.weight"],
            "parameter_sizes": [4, 2],
            "layers": ["a", "b"],
            "parameter_layers": [0, 1],
        },
        "optimizer": {"type": "SGD", "fused": False},
        "collector": "",
    } | changes


def make_ring(folder: Path, rank: int = 0, *, slots: int | None = None, **changes: Any) -> Ring:
    return Ring.create(folder / ring_name("first", rank), identity(rank, **changes), layers=LAYERS, slot_count=slots)


def leave(folder: Path, count: int, *, acknowledged: int = 0, **changes: Any) -> Path:
    """Ring of a rank that wrote so many records and has ended."""
    ring = make_ring(folder, **({"run": folder.parent.name} | changes))
    for sequence in range(1, count + 1):
        step(ring, sequence)
    ring.write_exit(ExitReason.FINISHED)
    reader = RingReader(ring.path)
    reader.acknowledge(acknowledged)
    return ring.path


def log_of(folder: Path) -> str:
    path = folder / "recorder.log"
    return path.read_text() if path.exists() else ""


def begin(ring: Ring, sequence: int) -> None:
    ring.begin_step(sequence, step=100 + sequence, wall=1.7e9, monotonic=time.monotonic(), learning_rate=0.5)


def measure(ring: Ring, sequence: int, **columns: float) -> None:
    """A row whose values tell which record and column they belong to."""
    values = {name: sequence + i / 100 for i, name in enumerate(MEASURED_NAMES)}
    values |= dict.fromkeys((name for name in MEASURED_NAMES if "nan_" in name or "inf_" in name), 0.0)
    values |= {"skipped": 0.0, "shadow": 0.0} | columns
    row = [*values.values(), *(sequence + 0.5 + layer for layer in range(2 * LAYERS))]
    ring.write_measured(sequence, row)


def step(ring: Ring, sequence: int, *, loss: float | None = 0.25, **columns: float) -> None:
    """A whole record."""
    begin(ring, sequence)
    measure(ring, sequence, **columns)
    ring.write_observed(sequence, step=None, loss=loss)
