"""From a ring's records to wire messages, and which records are urgent. Pure: no clock, no file, no network."""

from __future__ import annotations

import math
from typing import Any

from foreshock_protos.columns import (
    MEASURED_COLUMNS,
    MEASURED_NAMES,
    NONFINITE_COUNTS,
    NONFINITE_VALUES,
    WEIGHT_BLOCKS,
)
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.records import Record

_POSITION = {name: i for i, name in enumerate(MEASURED_NAMES)}
_PACKED = tuple((_POSITION[column.name], column.name) for column in MEASURED_COLUMNS if column.on_wire)
"""Position in a row of measured columns, and field of `StepBatch`."""
_VALUES = tuple(_POSITION[name] for name in NONFINITE_VALUES if name in _POSITION)
_COUNTS = tuple(_POSITION[name] for name in NONFINITE_COUNTS)
_GLOBAL_NORM, _SKIPPED, _SHADOW = (_POSITION[name] for name in ("global_norm", "skipped", "shadow"))
_JUMP = 3.0
"""A norm this many times the largest of the batch before does not wait for the next batch."""
_BATCH_BYTES = 2**20
"""A collector takes messages of a few MiB at most; with many layers that is less than its limit of rows."""


def hello(identity: dict[str, Any], pid: int) -> pb.FromRecorder:
    """Describe one instance in full. Raises `ValueError`, `TypeError` or `KeyError` if the identity is not one."""
    return pb.FromRecorder(
        hello=pb.Hello(
            schema_version=identity["schema_version"],
            instance=identity["instance"],
            experiment=identity["experiment"],
            run=identity["run"],
            launch_id=identity["launch_id"],
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
            # Rings of older versions have none.
            token=identity.get("token", ""),
        )
    )


class BatchPacker:
    """Packs the records of one instance into messages, one array a column."""

    def __init__(self, instance: str, *, rank: int, layers: int, local_norms: bool) -> None:
        self.instance = instance
        self.layers = layers
        self._local_norms = local_norms
        self.sends_layers = rank == 0
        """Every rank has the same averaged gradient and the same weights: one sends their layers."""
        self._unmeasured = bytes(8 * (len(MEASURED_NAMES) + 2 * layers))
        blocks = (1 + len(WEIGHT_BLOCKS)) * self.sends_layers + local_norms
        row_bytes = 8 * len(pb.StepBatch.DESCRIPTOR.fields) + 4 * layers * blocks
        self.max_rows = max(1, _BATCH_BYTES // row_bytes)
        """Rows that a message may carry."""

    def pack(
        self, first_sequence: int, records: list[Record], dropped: dict[str, int], *, backward_passes: int
    ) -> pb.FromRecorder:
        """Pack records whose sequence numbers follow each other; without any, the message only shows a live rank."""
        steps = pb.StepBatch(
            instance=self.instance,
            first_sequence=first_sequence,
            step=[r.step for r in records],
            wall_seconds=[r.wall_seconds for r in records],
            monotonic_seconds=[r.monotonic_seconds for r in records],
            learning_rate=[r.learning_rate for r in records],
            flags=[self.flags(r) for r in records],
            loss=[loss_of(r) for r in records],
            dropped=dropped,
            backward_passes=backward_passes,
        )
        rows = b"".join(self._unmeasured if r.measured is None else r.measured for r in records)
        table = memoryview(rows).cast("d")
        width, first = len(self._unmeasured) // 8, len(MEASURED_NAMES)
        for position, name in _PACKED:
            getattr(steps, name).extend(table[position::width].tolist())
        for start in range(first, len(table), width):
            middle, end = start + self.layers, start + 2 * self.layers
            if self.sends_layers:
                steps.global_layer_norms.extend(table[start:middle].tolist())
            if self._local_norms:
                steps.local_layer_norms.extend(table[middle:end].tolist())
        if self.sends_layers:
            self._pack_weights(steps, records)
        return pb.FromRecorder(steps=steps)

    def _pack_weights(self, steps: pb.StepBatch, records: list[Record]) -> None:
        for row, record in enumerate(records):
            if record.weights is None or record.measured is None:
                continue
            steps.weight_rows.append(row)
            for i, name in enumerate(WEIGHT_BLOCKS):
                block = record.weights[i * self.layers : (i + 1) * self.layers]
                getattr(steps, name).extend(block.tolist())

    def flags(self, record: Record) -> int:
        """Return the bits of RecordFlag of a record."""
        if record.measured is None:
            return record.flags | pb.INCOMPLETE
        flags: int = record.flags | (pb.LOCAL_NORMS if self._local_norms else 0)
        flags |= pb.SKIPPED if record.measured[_SKIPPED] > 0 else 0
        shadow = int(record.measured[_SHADOW])
        flags |= (pb.SHADOW_CLIPPED if shadow & 1 else 0) | (pb.SHADOW_SKIPPED if shadow & 2 else 0)
        return flags | (0 if record.loss is None else pb.LOSS_OBSERVED)


def loss_of(record: Record) -> float:
    """Return the rank's own loss; NaN, which flags tell from a measured one, if the script observed none."""
    return math.nan if record.loss is None else record.loss


def global_norm(record: Record) -> float | None:
    """Return the norm of the averaged gradient, if it was measured."""
    return None if record.measured is None else record.measured[_GLOBAL_NORM]


def is_nonfinite(record: Record) -> bool:
    """Return whether a finished record holds a NaN or an Inf, by the columns' table."""
    row = record.measured
    if row is None:
        return False
    if record.loss is not None and not math.isfinite(record.loss):
        return True
    # Loops, since this runs for each record: `any` over a generator takes a third longer.
    for i in _VALUES:
        if not math.isfinite(row[i]):
            return True
    for i in _COUNTS:  # noqa: SIM110
        if row[i] > 0:
            return True
    return False


def is_urgent(record: Record, largest_norm: float) -> bool:
    """Return whether a record should not wait for its batch: it is non-finite, or its norm jumps.

    largest_norm: of the batch before.
    """
    norm = global_norm(record)
    return is_nonfinite(record) or (norm is not None and norm > _JUMP * largest_norm)
