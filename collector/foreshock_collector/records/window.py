"""The window of records before an incident, of all ranks and layers: kept for good as its evidence."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.batch import RECORD, Rows
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.layer_weights import LayerWeights

_RANKED = np.dtype([("rank", "i8"), *((name, RECORD[name]) for name in RECORD.names or ())])
_SHOWN_RANKS = 16
"""Ranks of each step in the API: those with the largest norms."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Holds the records of consecutive steps."""

    records: Rows
    """Records with their rank; by step, then by rank."""
    sequences: NDArray[np.int64]
    layer_norms: NDArray[np.float32]
    """Norms of the averaged gradient, [sequences, layers]; NaN where no rank has sent them."""
    weights: LayerWeights
    """What some of the steps measured of the weights by layer."""

    @classmethod
    def from_buffer(cls, buffer: RecordBuffer, first: int, last: int) -> Window:
        """Return what the buffer still has of these steps."""
        found = []
        sequences = np.arange(max(1, first), last + 1)
        for sequence in sequences.tolist():
            ranks, rows = buffer.records(sequence)
            ranked = np.zeros(len(rows), _RANKED)
            for name in RECORD.names or ():
                ranked[name] = rows[name]
            ranked["rank"] = ranks
            found.append(ranked)
        records = np.concatenate(found) if found else np.zeros(0, _RANKED)
        norms = buffer.layer_norms_of(sequences).astype(np.float32)
        weights = buffer.weights.between(first, last)
        return cls(records=records, sequences=sequences, layer_norms=norms, weights=weights)

    def as_bytes(self) -> bytes:
        """Encode the window for the store."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            records=self.records,
            sequences=self.sequences,
            layer_norms=self.layer_norms,
            weight_sequences=self.weights.sequences,
            weight_blocks=self.weights.blocks,
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Window:
        """Decode a window from the store."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            norms = arrays["layer_norms"]
            weights = LayerWeights.empty(norms.shape[1])
            # Windows of older versions have none.
            if "weight_blocks" in arrays:
                weights = LayerWeights(sequences=arrays["weight_sequences"], blocks=arrays["weight_blocks"])
            return cls(records=arrays["records"], sequences=arrays["sequences"], layer_norms=norms, weights=weights)

    def largest_records(self) -> list[dict[str, Any]]:
        """Return the records of the ranks with the largest norms, step by step, as JSON objects."""
        shown = []
        for sequence in self.sequences.tolist():
            rows = self.records[self.records["sequence"] == sequence]
            norms = np.where(np.isfinite(rows["local_norm"]), rows["local_norm"], math.inf)
            chosen = np.sort(np.argsort(-norms, kind="stable")[:_SHOWN_RANKS])
            shown += [{name: row[name].item() for name in row.dtype.names or ()} for row in rows[chosen]]
        return shown
