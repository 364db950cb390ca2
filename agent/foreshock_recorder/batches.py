"""From what a ring holds to wire messages, and which records are trouble. Pure: no clock, no file, no network."""

from __future__ import annotations

import math
from typing import Any

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.reader import Record
from foreshock_recorder.ring import DEVICE_COLUMNS, EDITED, GRADIENT_UNKNOWN, NOT_STEPPED

_POSITION = {name: i for i, name in enumerate(DEVICE_COLUMNS)}
_FLAG_COLUMNS = ("skipped", "shadow")
_WIRE_COLUMNS = tuple(name for name in DEVICE_COLUMNS if name not in _FLAG_COLUMNS)
_COUNTS_OF_BAD = ("global_nan_parameters", "global_inf_parameters", "local_nan_parameters", "local_inf_parameters")
_LAUNCHED_FLAGS = ((EDITED, pb.EDITED), (NOT_STEPPED, pb.NOT_STEPPED), (GRADIENT_UNKNOWN, pb.GRADIENT_UNKNOWN))
_JUMP = 3.0
"""A norm this many times the largest of the batch before does not wait for the next one."""
_BATCH_BYTES = 2**20
"""A collector takes messages of a few MiB at most; with many layers that is less than its limit of rows."""


def hello(identity: dict[str, Any], pid: int) -> pb.FromRecorder:
    """Full state of one instance. Raises `ValueError`, `TypeError` or `KeyError` if the identity is not one."""
    return pb.FromRecorder(
        hello=pb.Hello(
            schema_version=identity["schema_version"],
            instance=identity["instance"],
            experiment=identity["experiment"],
            run=identity["run"],
            launch=identity["launch"],
            started_seconds=identity["started_seconds"],
            topology=pb.Topology(
                rank=identity["rank"],
                local_rank=identity["local_rank"],
                world_size=identity["world_size"],
                node=identity["node"],
            ),
            model=pb.ModelSummary(**identity["model"]),
            optimizer=pb.OptimizerSummary(**identity["optimizer"]),
            clip=identity["clip"],
            capabilities=identity["capabilities"],
            versions=identity["versions"],
            pid=pid,
        )
    )


class Columns:
    """Packs records of one instance: it knows which columns its rows have."""

    def __init__(self, instance: str, *, rank: int, layers: int, local_norms: bool) -> None:
        self._instance = instance
        self._layers = layers
        self._local_norms = local_norms
        # Every rank has the same averaged gradient: one tells its layers.
        self._global_layers = rank == 0
        self._nothing = bytes(8 * (len(DEVICE_COLUMNS) + 2 * layers))
        row_bytes = 8 * len(pb.StepBatch.DESCRIPTOR.fields) + 4 * layers * (self._global_layers + local_norms)
        self.most_rows = max(1, _BATCH_BYTES // row_bytes)
        """Rows that a message may carry."""

    def pack(
        self, first_sequence: int, records: list[Record], dropped: dict[str, int], *, backward_passes: int
    ) -> pb.FromRecorder:
        """Columns of these records, whose sequence numbers follow each other; of none, a sign of life."""
        steps = pb.StepBatch(
            instance=self._instance,
            first_sequence=first_sequence,
            step=[r.step for r in records],
            wall_seconds=[r.wall_seconds for r in records],
            monotonic_seconds=[r.monotonic_seconds for r in records],
            learning_rate=[r.learning_rate for r in records],
            flags=[self._flags(r) for r in records],
            loss=[math.nan if r.loss is None else r.loss for r in records],
            dropped=dropped,
            backward_passes=backward_passes,
        )
        rows = b"".join(self._nothing if r.measured is None else r.measured for r in records)
        table = memoryview(rows).cast("d")
        width, first = len(self._nothing) // 8, len(DEVICE_COLUMNS)
        for name in _WIRE_COLUMNS:
            getattr(steps, name).extend(table[_POSITION[name] :: width].tolist())
        for start in range(first, len(table), width):
            middle, end = start + self._layers, start + 2 * self._layers
            if self._global_layers:
                steps.global_layer_norms.extend(table[start:middle].tolist())
            if self._local_norms:
                steps.local_layer_norms.extend(table[middle:end].tolist())
        return pb.FromRecorder(steps=steps)

    def _flags(self, record: Record) -> int:
        flags: int = sum(wire for ours, wire in _LAUNCHED_FLAGS if record.flags & ours)
        if record.measured is None:
            return flags | pb.INCOMPLETE
        flags |= pb.LOCAL_NORMS if self._local_norms else 0
        flags |= pb.SKIPPED if record.measured[_POSITION["skipped"]] > 0 else 0
        shadow = int(record.measured[_POSITION["shadow"]])
        flags |= (pb.SHADOW_CLIPPED if shadow & 1 else 0) | (pb.SHADOW_SKIPPED if shadow & 2 else 0)
        return flags | (0 if record.loss is None else pb.LOSS_OBSERVED)


def global_norm(record: Record) -> float | None:
    """Of the averaged gradient, if it was measured."""
    return None if record.measured is None else record.measured[_POSITION["global_norm"]]


def troubled(record: Record, largest_norm: float) -> bool:
    """Something is not finite, or the norm jumps far above `largest_norm`, the largest of the batch before."""
    norm = global_norm(record)
    if record.measured is None or norm is None:
        return False
    return (
        not math.isfinite(norm)
        or norm > _JUMP * largest_norm
        or (record.loss is not None and not math.isfinite(record.loss))
        or not math.isfinite(record.measured[_POSITION["local_norm"]])
        or any(record.measured[_POSITION[name]] > 0 for name in _COUNTS_OF_BAD)
    )
