"""Norms of weights, updates and moments by layer, at the steps that measured them. numpy, no clock."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from foreshock_protos.columns import WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb

_MOST_MEASURED = 512
"""Measured steps that a history keeps."""
_LEAST_MEASURED = 8
_MOST_VALUES = 2**22
"""Values of 4 bytes that a history keeps: of a model with very many layers, it keeps fewer steps."""

Blocks = NDArray[np.float32]
"""[steps, len(WEIGHT_BLOCKS), layers]: what each block measured by layer; 0 where it measured nothing."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Holds what some steps measured of the layers' weights."""

    sequences: NDArray[np.int64]
    """Sequence numbers of these steps, ascending: [steps]."""
    blocks: Blocks

    @classmethod
    def from_batch(cls, batch: pb.StepBatch, layers: int) -> LayerWeights:
        """Decode a batch. Raises `ValueError` if its blocks contradict its rows."""
        rows = np.fromiter(batch.weight_rows, "i8", len(batch.weight_rows))
        if (np.diff(rows) <= 0).any() or (rows >= len(batch.step)).any():
            raise ValueError(f"weight_rows must ascend and stay below the {len(batch.step)} rows of the batch")
        blocks = np.zeros((len(rows), len(WEIGHT_BLOCKS), layers), "f4")
        for i, name in enumerate(WEIGHT_BLOCKS):
            sent = getattr(batch, name)
            if len(sent) not in (0, len(rows) * layers):
                raise ValueError(f"{name} has {len(sent)} values, not {len(rows)} rows of {layers} layers")
            if sent:
                blocks[:, i] = np.fromiter(sent, "f4", len(sent)).reshape(len(rows), layers)
        # A batch without rows may have any number.
        first = batch.first_sequence if len(rows) else 0
        return cls(sequences=rows + first, blocks=blocks)

    @classmethod
    def empty(cls, layers: int) -> LayerWeights:
        """Return the weights of no step."""
        return cls(sequences=np.zeros(0, "i8"), blocks=np.zeros((0, len(WEIGHT_BLOCKS), layers), "f4"))

    def between(self, first: int, last: int) -> LayerWeights:
        """Return the part of these steps."""
        return self.only((self.sequences >= first) & (self.sequences <= last))

    def only(self, chosen: NDArray[np.bool_]) -> LayerWeights:
        """Return the part of the chosen steps: [steps]."""
        return LayerWeights(sequences=self.sequences[chosen], blocks=self.blocks[chosen])

    def values(self) -> NDArray[np.float64]:
        """Return all blocks, NaN where they measured nothing: [steps, blocks, layers], in WEIGHT_BLOCKS' order."""
        values = self.blocks.astype(np.float64)
        values[values == 0] = math.nan
        return values

    def block(self, name: str) -> NDArray[np.float64]:
        """Return a block, as in `values`: [steps, layers]. name: one of WEIGHT_BLOCKS."""
        return self.values()[:, WEIGHT_BLOCKS.index(name)]


class WeightHistory:
    """Keeps the newest measured steps of one attempt."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        values = max(1, layers * len(WEIGHT_BLOCKS))
        self._most = min(_MOST_MEASURED, max(_LEAST_MEASURED, _MOST_VALUES // values))
        self._kept: list[tuple[int, Blocks]] = []

    def write(self, weights: LayerWeights) -> None:
        """Add measured steps, in whatever order they come; those that are known already stay as they are."""
        if weights.blocks.shape[2] != self._layers:
            return
        for sequence, blocks in zip(weights.sequences.tolist(), weights.blocks, strict=True):
            place = bisect_left(self._kept, sequence, key=itemgetter(0))
            if place == len(self._kept) or self._kept[place][0] != sequence:
                self._kept.insert(place, (sequence, blocks))
        del self._kept[: -self._most]

    def between(self, first: int, last: int) -> LayerWeights:
        """Return what is kept of these steps."""
        kept = [(sequence, blocks) for sequence, blocks in self._kept if first <= sequence <= last]
        shape = (len(kept), len(WEIGHT_BLOCKS), self._layers)
        blocks = np.array([each for _, each in kept], "f4").reshape(shape)
        return LayerWeights(sequences=np.array([sequence for sequence, _ in kept], "i8"), blocks=blocks)
