"""A block of several ranks' records of the same steps: as it comes in a message, and as it goes into the buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.batch import (
    MAX_SEQUENCE,
    RECORD,
    SUMS,
    ColumnsError,
    Records,
    Rows,
    bounded_values,
    nonfinite_mask,
)
from foreshock_collector.records.layer_weights import LayerWeights
from foreshock_collector.records.steps import LARGEST
from foreshock_protos.columns import RECORD_COLUMNS, WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb

_WORD = 8
_WORDS = RECORD.itemsize // _WORD
_OPTIONAL = [column for column in RECORD_COLUMNS if column.optional]
_LEAST_WORDS = _WORDS - len(_OPTIONAL)
_MOST_WORDS = 256
"""Of a record: a newer version knows more columns, but not that many."""
_FLAGS_LIMIT = 2**32
_FLOATS = np.array([1 + place for place, column in enumerate(RECORD_COLUMNS) if not column.integer])
"""Places of the float64 columns in a record."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Holds records of consecutive steps; the fields are those of `Records`, with rows [steps, ranks]."""

    rows: Rows
    sums: Rows
    layer_norms: NDArray[np.float32] | None
    weights: LayerWeights

    @classmethod
    def of_records(cls, records: Records) -> Block:
        """Return the block of a single rank."""
        return cls(
            rows=records.rows[:, None], sums=records.sums, layer_norms=records.layer_norms, weights=records.weights
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sequences(self) -> NDArray[np.int64]:
        """Sequence numbers of the steps: [steps]."""
        found: NDArray[np.int64] = self.rows["sequence"][:, 0]
        return found

    @cached_property
    def nonfinite(self) -> NDArray[np.bool_]:
        """Which records hold a NaN or an Inf: [steps, ranks]."""
        return nonfinite_mask(self.rows)

    def records(self, place: int) -> Records:
        """Return the records of one of its ranks."""
        return Records(rows=self.rows[:, place], sums=self.sums, layer_norms=self.layer_norms, weights=self.weights)

    def ranks(self, places: Sequence[int]) -> Block:
        """Return the part of some of its ranks."""
        if len(places) == self.rows.shape[1]:
            return self
        return Block(rows=self.rows[:, places], sums=self.sums, layer_norms=self.layer_norms, weights=self.weights)

    def slices(self, length: int) -> Iterator[Block]:
        """Yield pieces of at most this many steps, in order."""
        if len(self) <= length:
            yield self
            return
        for start in range(0, len(self), length):
            piece = slice(start, start + length)
            norms = None if self.layer_norms is None else self.layer_norms[piece]
            sequences = self.sequences[piece]
            weights = self.weights.between(int(sequences[0]), int(sequences[-1]))
            yield Block(rows=self.rows[piece], sums=self.sums, layer_norms=norms, weights=weights)


def decode_block(block: pb.StepBlock, layers: int) -> Block:
    """Read the bytes of a block. Raises `ColumnsError`."""
    count, ranks = block.steps, len(block.ranks)
    rows = _rows(block, count, ranks)
    sums = _array("sums", block.sums, SUMS, count, "a result for each step, or none")
    issuers = sums["reduced_sequence"]
    sums = sums[(issuers >= 1) & (issuers < block.first_sequence + count)]
    norms = _array(
        "global_layer_norms",
        block.global_layer_norms,
        np.dtype("<f4"),
        count * layers,
        "a value for each step and layer, or none",
    )
    return Block(
        rows=rows,
        sums=sums,
        layer_norms=norms.reshape(count, layers) if len(norms) else None,
        weights=_weights(block, count, layers),
    )


def _rows(block: pb.StepBlock, count: int, ranks: int) -> Rows:
    if count and not ranks:
        raise ColumnsError(f"{count} steps of no rank")
    if count and not 0 < block.first_sequence < MAX_SEQUENCE - count:
        raise ColumnsError(f"first_sequence {block.first_sequence} is out of range: records are numbered from 1")
    size = len(block.records)
    words, rest = divmod(size, _WORD * count * ranks) if count and ranks else (_WORDS, size)
    if rest or not _LEAST_WORDS <= words <= _MOST_WORDS:
        raise ColumnsError(f"records has {size} bytes, which are no records of {count} steps and {ranks} ranks")
    sent = np.frombuffer(block.records, "<i8").reshape(count, ranks, words)
    # Copied: what is kept in memory must not keep the message.
    kept = np.zeros((count, ranks, _WORDS), "<i8")
    kept[..., : min(words, _WORDS)] = sent[..., :_WORDS]
    floats = kept.view("<f8")
    for i in range(words, _WORDS):
        floats[..., i] = RECORD_COLUMNS[i - 1].missing
    rows: Rows = kept.view(RECORD)[..., 0]
    expected = np.arange(block.first_sequence, block.first_sequence + count)
    if (rows["sequence"] != expected[:, None]).any():
        raise ColumnsError(f"records are not numbered {block.first_sequence}, {block.first_sequence + 1} and so on")
    flags = rows["flags"]
    if ((flags < 0) | (flags >= _FLAGS_LIMIT)).any():
        raise ColumnsError("records have flags that are out of range")
    with np.errstate(invalid="ignore"):
        sizes = np.abs(floats[..., _FLOATS])
        usual = (sizes <= LARGEST) & ((sizes >= 1 / LARGEST) | (sizes == 0))
    if not usual.all():
        for place in _FLOATS.tolist():
            floats[..., place] = bounded_values(floats[..., place])
    return rows


def _weights(block: pb.StepBlock, count: int, layers: int) -> LayerWeights:
    if not block.weight_rows and not block.layer_weights:
        return LayerWeights.empty(layers)
    rows = np.fromiter(block.weight_rows, "i8", len(block.weight_rows))
    if (np.diff(rows) <= 0).any() or (rows >= count).any():
        raise ColumnsError(f"weight_rows must ascend and stay below the {count} steps of the block")
    wanted = len(rows) * len(WEIGHT_BLOCKS) * layers
    values = np.frombuffer(block.layer_weights, "<f4") if len(block.layer_weights) == 4 * wanted else None
    if values is None:
        raise ColumnsError(
            f"layer_weights has {len(block.layer_weights)} bytes, not {len(WEIGHT_BLOCKS)} values "
            f"for each of {len(rows)} steps and {layers} layers"
        )
    first = block.first_sequence if len(rows) else 0
    return LayerWeights(sequences=rows + first, blocks=values.reshape(len(rows), len(WEIGHT_BLOCKS), layers).copy())


def _array(name: str, data: bytes, kind: np.dtype[Any], count: int, what: str) -> NDArray[Any]:
    if len(data) not in (0, count * kind.itemsize):
        raise ColumnsError(f"{name} has {len(data)} bytes, not {what}")
    return np.frombuffer(data, kind)
