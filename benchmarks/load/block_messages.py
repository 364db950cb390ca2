"""Blocks made of batches: the same records in the layout of the contract's second version."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreshock_protos.columns import RECORD_COLUMNS, REDUCED_COLUMNS, WEIGHT_BLOCKS, Column
from foreshock_protos.v1 import telemetry_pb2 as pb


def _dtype(columns: Sequence[Column]) -> list[tuple[str, str]]:
    return [(column.name, "<i8" if column.integer else "<f8") for column in columns]


RECORD = np.dtype([("sequence", "<i8"), *_dtype(RECORD_COLUMNS)])
SUMS = np.dtype(_dtype(REDUCED_COLUMNS))


def block_of(batches: Sequence[pb.StepBatch]) -> pb.StepBlock:
    """Return the block of ranks whose batches are of the same steps, and have every column."""
    first, count = batches[0].first_sequence, len(batches[0].step)
    records, sums = np.zeros((count, len(batches)), RECORD), np.zeros(count, SUMS)
    records["sequence"] = np.arange(first, first + count)[:, None]
    for place, batch in enumerate(batches):
        for column in RECORD_COLUMNS:
            values = getattr(batch, column.name)
            records[column.name][:, place] = _whole(values) if column.integer else values
    for column in REDUCED_COLUMNS:
        values = getattr(batches[0], column.name)
        sums[column.name] = _whole(values) if column.integer else values
    block = pb.StepBlock(first_sequence=first, steps=count, records=records.tobytes(), sums=sums.tobytes())
    for batch in batches:
        block.ranks.add(instance=batch.instance, dropped=batch.dropped, backward_passes=batch.backward_passes)
        if batch.global_layer_norms:
            block.global_layer_norms = np.array(batch.global_layer_norms, "<f4").tobytes()
        if batch.weight_rows:
            weights = [
                np.array(getattr(batch, name), "<f4").reshape(len(batch.weight_rows), -1) for name in WEIGHT_BLOCKS
            ]
            block.weight_rows.extend(batch.weight_rows)
            block.layer_weights = np.stack(weights, axis=1).tobytes()
    return block


def _whole(values: Sequence[float]) -> list[int]:
    """Return what a recorder makes of columns that are measured as float64, and sent as int64."""
    return [int(value) if abs(value) < 2**63 else -1 for value in values]
