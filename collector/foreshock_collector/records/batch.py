"""A batch of one rank's records: decoded from the columns of a message, and what each record says by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.gaps import Gap, in_gaps
from foreshock_collector.records.layer_weights import LayerWeights
from foreshock_collector.records.steps import LARGEST
from foreshock_protos.columns import (
    NONFINITE_COUNTS,
    NONFINITE_VALUES,
    RECORD_COLUMNS,
    REDUCED_COLUMNS,
    WIRE_COLUMNS,
    Column,
    Part,
)
from foreshock_protos.v1 import telemetry_pb2 as pb

MAX_SEQUENCE = 2**53
"""Limit of sequence numbers, which start at 1: a float64 holds each of them exactly."""


def _dtype(columns: tuple[Column, ...]) -> list[tuple[str, str]]:
    return [(column.name, "<i8" if column.integer else "<f8") for column in columns]


RECORD = np.dtype([("sequence", "<i8"), *_dtype(RECORD_COLUMNS)])
"""One rank's record of one step, by the names of the columns. Sequence 0 marks an empty cell."""
SUMS = np.dtype(_dtype(REDUCED_COLUMNS))
"""The result of one step's all-reduce: the same on every rank, so any rank's copy will do."""

Rows = NDArray[np.void]


def words(rows: Rows) -> NDArray[np.int64]:
    """Return a view of records as the numbers of eight bytes that they consist of: [..., columns].

    numpy copies these at once, and records field by field, which takes several times as long.
    """
    return rows[..., None].view(np.int64)


def taken(rows: Rows, *places: NDArray[np.int64]) -> Rows:
    """Return a copy of `rows[places]`."""
    copied: Rows = words(rows)[places].view(RECORD)[..., 0]
    return copied


class ColumnsError(ValueError):
    """A batch contradicts itself; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Holds a decoded batch."""

    rows: Rows
    sums: Rows
    layer_norms: NDArray[np.float32] | None
    """Norms of the averaged gradient, [rows, layers]; one rank of the attempt sends them."""
    weights: LayerWeights
    """What some of the rows measured of the weights by layer; sent by the same rank."""

    def __len__(self) -> int:
        return len(self.rows)

    def above(self, position: int, gaps: Sequence[Gap] = ()) -> Records:
        """Return the records above this sequence number, and those in a gap below it."""

        def new(sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
            return (sequences > position) | in_gaps(gaps, sequences)

        keep = new(self.rows["sequence"])
        norms = None if self.layer_norms is None else self.layer_norms[keep]
        weights = self.weights.only(new(self.weights.sequences))
        return Records(rows=self.rows[keep], sums=self.sums, layer_norms=norms, weights=weights)

    def slices(self, length: int) -> Iterator[Records]:
        """Yield pieces of at most this many rows, in order."""
        for start in range(0, len(self.rows), length):
            piece = slice(start, start + length)
            norms = None if self.layer_norms is None else self.layer_norms[piece]
            rows = self.rows[piece]
            weights = self.weights.between(int(rows["sequence"][0]), int(rows["sequence"][-1]))
            yield Records(rows=rows, sums=self.sums, layer_norms=norms, weights=weights)


def decode(batch: pb.StepBatch, layers: int) -> Records:
    """Turn columns into rows. Raises `ColumnsError`."""
    count = len(batch.step)
    for column in WIRE_COLUMNS:
        rows_of = len(getattr(batch, column.name))
        if rows_of != count and not (column.optional and rows_of == 0):
            raise ColumnsError(f"column {column.name} has {rows_of} rows, column step has {count}")
    for name in ("global_layer_norms", "local_layer_norms"):
        if len(getattr(batch, name)) not in (0, count * layers):
            raise ColumnsError(f"{name} has {len(getattr(batch, name))} values, not {count} rows of {layers} layers")
    if count and not 0 < batch.first_sequence < MAX_SEQUENCE - count:
        raise ColumnsError(f"first_sequence {batch.first_sequence} is out of range: records are numbered from 1")
    rows = np.zeros(count, RECORD)
    rows["sequence"] = np.arange(batch.first_sequence, batch.first_sequence + count)
    for column in RECORD_COLUMNS:
        rows[column.name] = _values(batch, column, count)
    issuers = np.fromiter(batch.reduced_sequence, "f8", count)
    known = (issuers >= 1) & (issuers < batch.first_sequence + count)
    sums = np.zeros(int(known.sum()), SUMS)
    for column in REDUCED_COLUMNS if known.any() else ():
        sums[column.name] = np.fromiter(getattr(batch, column.name), "f8", count)[known]
    norms = None
    if batch.global_layer_norms:
        norms = np.fromiter(batch.global_layer_norms, "f4", count * layers).reshape(count, layers)
    try:
        weights = LayerWeights.from_batch(batch, layers)
    except ValueError as error:
        raise ColumnsError(str(error)) from error
    return Records(rows=rows, sums=sums, layer_norms=norms, weights=weights)


def _values(batch: pb.StepBatch, column: Column, count: int) -> NDArray[np.int64] | NDArray[np.float64]:
    sent = getattr(batch, column.name)
    if len(sent) < count:
        return np.full(count, column.missing)
    if column.integer and column.part is Part.BEGUN:
        return np.fromiter(sent, "i8", count)
    values = np.fromiter(sent, "f8", count)
    # What is measured travels as float64, and not each of those is a whole number.
    return np.where(abs(values) < MAX_SEQUENCE, values, -1.0) if column.integer else bounded_values(values)


def bounded_values(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Do to an array what `steps.bounded` does to a number."""
    kept = np.where(np.isinf(values), values, np.clip(values, -LARGEST, LARGEST))
    return np.where(abs(kept) < 1 / LARGEST, 0.0, kept)


def nonfinite_mask(rows: Rows) -> NDArray[np.bool_]:
    """Return which finished records hold a NaN or an Inf, by the columns' table."""
    bad = np.zeros(rows.shape, np.bool_)
    for name in NONFINITE_VALUES:
        bad |= ~np.isfinite(rows[name]) & (observed(rows) if name == "loss" else True)
    for name in NONFINITE_COUNTS:
        bad |= rows[name] > 0
    bad &= complete(rows)
    return bad


def locally_nonfinite(rows: Rows) -> NDArray[np.bool_]:
    """Return which records are non-finite on their own rank, before an all-reduce could have spread it."""
    bad: NDArray[np.bool_] = (rows["local_nan_parameters"] > 0) | (rows["local_inf_parameters"] > 0)
    bad |= observed(rows) & ~np.isfinite(rows["loss"])
    return bad


def complete(rows: Rows) -> NDArray[np.bool_]:
    """Return which records are of steps that finished."""
    finished: NDArray[np.bool_] = rows["flags"] & pb.INCOMPLETE == 0
    return finished


def locally_measured(rows: Rows) -> NDArray[np.bool_]:
    """Return which records hold norms of the rank's own gradient: a backward pass came before them."""
    known: NDArray[np.bool_] = (rows["flags"] & pb.LOCAL_NORMS != 0) & complete(rows)
    known &= (rows["flags"] & pb.GRADIENT_UNKNOWN == 0) | (rows["local_norm"] != 0)
    return known


def observed(rows: Rows) -> NDArray[np.bool_]:
    """Return which records hold a loss."""
    has_loss: NDArray[np.bool_] = rows["flags"] & pb.LOSS_OBSERVED != 0
    return has_loss
