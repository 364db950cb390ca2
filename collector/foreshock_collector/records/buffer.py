"""The buffer of the newest records of every rank of one attempt.

All of it is numpy: a batch goes in at once, and steps are read in blocks. Times come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.assembly import Ranks, assembled
from foreshock_collector.records.batch import (
    RECORD,
    SUMS,
    Records,
    Rows,
    complete,
    locally_measured,
    words,
)
from foreshock_collector.records.block import Block
from foreshock_collector.records.deadlines import Deadlines
from foreshock_collector.records.layer_weights import WeightHistory
from foreshock_collector.records.steps import Step
from foreshock_protos.v1 import telemetry_pb2 as pb

_USUAL_CELLS, _MOST_CELLS = 2**15, 2**18
"""Cells of a buffer, about 200 bytes each: a job of many ranks keeps fewer steps, so that dozens of them fit."""
_LEAST_STEPS, _USUAL_STEPS, _MOST_STEPS = 64, 256, 2048
_MOST_LAYER_NORMS = 2**22
"""Norms by layer, 4 bytes each; a model of more than 2,048 layers keeps them for fewer steps."""
_ASSEMBLED_AT_ONCE = 2**12
"""Records of the steps that are assembled at once: their memory is bounded, whatever the number of ranks."""


def capacity_for(world_size: int) -> int:
    """Return how many steps of a job are kept."""
    fit = max(_USUAL_CELLS // world_size, min(_USUAL_STEPS, _MOST_CELLS // world_size))
    return min(max(_LEAST_STEPS, fit), _MOST_STEPS)


class RecordBuffer:
    """Ring buffer of one attempt's records, steps down and ranks across.

    Records wait in it until every rank has reported their step; those of finalized steps stay as evidence.
    """

    def __init__(self, *, world_size: int, layers: int, finalized: int = 0) -> None:
        self.capacity = capacity_for(world_size)
        self.finalized = finalized
        """Sequence number up to which steps have been assembled."""
        self.highest = finalized
        """The highest sequence number of any rank."""
        self.positions = np.zeros(world_size, "i8")
        """The highest sequence number of each rank."""
        self.awaited = np.ones(world_size, np.bool_)
        """Ranks that may still report."""
        self._ranks = np.zeros(0, "i8")
        """The rank of each column, in the order in which ranks first sent a record: one that claims a large job must
        not cost the memory of it."""
        self._columns: dict[int, int] = {}
        self._by_rank = np.zeros(0, "i8")
        """Columns, by rank."""
        self._cells: Rows = np.zeros((self.capacity, 1), RECORD)
        self._sums: Rows = np.zeros(self.capacity, SUMS)
        self._layer_steps = min(self.capacity, max(_LEAST_STEPS, _MOST_LAYER_NORMS // max(1, layers)))
        self._layer_norms = np.zeros((self._layer_steps, layers), "f4")
        self._layer_sequences = np.zeros(self._layer_steps, "i8")
        self.weights = WeightHistory(layers)
        """What the newest measured steps have of the weights by layer."""
        self._deadlines = Deadlines(self.capacity, world_size)

    def must_finalize(self, last: int) -> int:
        """Return the sequence number up to which steps must be finalized before records up to `last` are written."""
        return last - self.capacity

    def write(self, rank: int, records: Records, now: float) -> None:
        """Store the records of one rank; see `write_block`."""
        self.write_block([rank], Block.of_records(records), now)

    def write_block(self, ranks: Sequence[int], block: Block, now: float) -> None:
        """Store records: those of finalized steps as evidence, the others until their step is due."""
        sequences = block.sequences
        last = int(sequences[-1])
        assert self.must_finalize(last) <= self.finalized
        slots = sequences % self.capacity
        columns = self._columns_of(ranks)
        cells = slots[:, None], columns
        # A very late record must not displace a newer one.
        fresh = sequences[:, None] >= self._cells["sequence"][cells]
        if fresh.all():
            words(self._cells)[cells] = words(block.rows)
        else:
            steps, places = np.nonzero(fresh)
            self._cells[slots[steps], columns[places]] = block.rows[fresh]
        if block.layer_norms is not None and block.layer_norms.shape[1] == self._layer_norms.shape[1]:
            kept = sequences % self._layer_steps
            newer = sequences >= self._layer_sequences[kept]
            self._layer_norms[kept[newer]] = block.layer_norms[newer]
            self._layer_sequences[kept[newer]] = sequences[newer]
        self.weights.write(block.weights)
        recent = block.sums[block.sums["reduced_sequence"] > max(last, self.highest) - self.capacity]
        self._sums[recent["reduced_sequence"] % self.capacity] = recent
        # A gap waits like a record: another rank may yet fill it.
        before = min(int(self.positions[rank]) for rank in ranks)
        waiting = np.arange(max(self.finalized, before, last - self.capacity) + 1, last + 1)
        bad = sequences[block.nonfinite.any(axis=1)]
        self._deadlines.start(ranks, waiting, bad[bad > self.finalized], now)
        self.positions[ranks] = np.maximum(self.positions[ranks], last)
        self.highest = max(last, self.highest)

    def _columns_of(self, ranks: Sequence[int]) -> NDArray[np.int64]:
        known = self._columns
        return np.array([known[rank] if rank in known else self._add_column(rank) for rank in ranks], np.int64)

    def _add_column(self, rank: int) -> int:
        column = self._columns[rank] = len(self._ranks)
        self._ranks = np.append(self._ranks, rank)
        self._by_rank = np.argsort(self._ranks)
        if column == self._cells.shape[1]:
            grown: Rows = np.zeros((self.capacity, 2 * column), RECORD)
            # Only what holds records: pages that nobody writes take no memory.
            used = self._cells["sequence"].any(axis=1)
            grown[used, :column] = self._cells[used]
            self._cells = grown
        return column

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to the time until which each step waits."""
        self._deadlines.move_clock(seconds)

    def due(self, now: float, *, whole: int | None = None) -> int:
        """Return the sequence number up to which steps may be assembled: every rank has passed them, or time is up.

        whole: that up to which no rank's records have a gap, which may yet be filled; None: there is no gap.
        """
        passed = int(self.positions[self.awaited].min()) if self.awaited.any() else self.highest
        due = max(self.finalized, min(passed, self.highest if whole is None else min(whole, self.highest)))
        waiting = np.arange(due + 1, self.highest + 1)
        late = waiting[self._passed(waiting, now)]
        return int(late[-1]) if late.size else due

    def overdue(self, now: float) -> bool:
        """Return whether a step has waited long enough, though a rank is still missing."""
        if self.finalized == self.highest or self._deadlines.none_passed(now):
            return False
        waiting = np.arange(self.finalized + 1, self.highest + 1)
        return bool(self._passed(waiting, now).any())

    def _passed(self, waiting: NDArray[np.int64], now: float) -> NDArray[np.bool_]:
        return self._deadlines.passed(waiting, now, positions=self.positions, awaited=self.awaited)

    def finalize(self, attempt: int, upto: int) -> Iterator[Step]:
        """Assemble steps, in order, up to a sequence number."""
        last, length = min(upto, self.highest), max(1, _ASSEMBLED_AT_ONCE // max(1, len(self._ranks)))
        for first in range(self.finalized + 1, last + 1, length):
            sequences = np.arange(first, min(first + length, last + 1))
            try:
                steps = self._assemble(attempt, sequences)
            except Exception:
                # One by one instead, so that the error comes again, at its own step, and costs no other.
                steps = []
            for place, sequence in enumerate(sequences.tolist()):
                self.finalized = sequence
                self._deadlines.end(sequence)
                step = steps[place] if steps else self.assembled_again(attempt, sequence)
                if step is not None:
                    yield step
        self.finalized = max(self.finalized, upto)
        self.highest = max(self.finalized, self.highest)

    def assembled_again(self, attempt: int, sequence: int) -> Step | None:
        """Assemble a finalized step once more, with the records that have come since."""
        return self._assemble(attempt, np.array([sequence]))[0]

    def _assemble(self, attempt: int, sequences: NDArray[np.int64]) -> list[Step | None]:
        if not len(self._ranks):
            return [None] * len(sequences)
        ranks = Ranks(cells=self._cells, columns=self._by_rank, sequences=sequences)
        with np.errstate(all="ignore"):
            return assembled(attempt, ranks, self._sums[sequences % self.capacity], len(self.positions))

    def records(self, sequence: int) -> tuple[NDArray[np.int64], Rows]:
        """Return the ranks that have finished one step, and their records of it."""
        cells = self._cells[sequence % self.capacity, self._by_rank]
        found = (cells["sequence"] == sequence) & complete(cells)
        return self._ranks[self._by_rank[found]], cells[found]

    def sums(self, sequence: int) -> Rows | None:
        """Return the result of one step's all-reduce, if any rank has sent it."""
        sums = self._sums[sequence % self.capacity]
        return sums if sums["reduced_sequence"] == sequence else None

    def layer_norms(self, sequence: int) -> NDArray[np.float32] | None:
        """Return the norms of the averaged gradient by layer, if a rank has sent them."""
        slot = sequence % self._layer_steps
        return self._layer_norms[slot] if self._layer_sequences[slot] == sequence else None

    def local_norms(self, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return local norms, [steps, ranks]: NaN where no record holds one.

        Ranks that have never sent a record are a single last column of NaN.
        """
        cells = self._cells[(sequences % self.capacity)[:, None], self._by_rank]
        known = (cells["sequence"] == sequences[:, None]) & locally_measured(cells)
        norms: NDArray[np.float64] = np.where(known, cells["local_norm"], math.nan)
        if len(self._ranks) == len(self.positions):
            return norms
        return np.column_stack((norms, np.full(len(sequences), math.nan)))

    def compared(self, sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which steps have a fingerprint of the weights from every rank, [steps]."""
        if len(self._ranks) < len(self.positions):
            return np.zeros(len(sequences), np.bool_)
        cells = (sequences % self.capacity)[:, None], self._by_rank
        # Most steps have none.
        known = self._cells["parameter_fingerprint"][cells] >= 0
        if known.any():
            known &= self._cells["sequence"][cells] == sequences[:, None]
            known &= self._cells["flags"][cells] & pb.INCOMPLETE == 0
        found: NDArray[np.bool_] = np.logical_and.reduce(known, axis=1)
        return found

    def local_norms_by_rank(self, sequences: NDArray[np.int64]) -> dict[int, NDArray[np.float64]]:
        """Return local norms, [steps], of each rank that has sent a record."""
        norms = self.local_norms(sequences)
        return {rank: norms[:, place] for place, rank in enumerate(self._ranks[self._by_rank].tolist())}

    def rank_norms(self, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return local norms for display, [steps, ranks]: NaN where none is known, Inf where it is not finite."""
        cells = (sequences % self.capacity)[:, None], self._by_rank
        # Field by field: whole records would be twenty times as much to copy.
        norms: NDArray[np.float64] = self._cells["local_norm"][cells]
        bad = (self._cells["local_nan_parameters"][cells] > 0) | (self._cells["local_inf_parameters"][cells] > 0)
        norms[bad | ~np.isfinite(norms)] = math.inf
        flags = self._cells["flags"][cells]
        measured = (flags & pb.LOCAL_NORMS != 0) & (flags & pb.INCOMPLETE == 0)
        norms[~measured | (self._cells["sequence"][cells] != sequences[:, None])] = math.nan
        shown = np.full((len(sequences), len(self.positions)), math.nan)
        shown[:, self._ranks[self._by_rank]] = norms
        return shown

    def layer_norms_of(self, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return norms of the averaged gradient for display, [steps, layers]: NaN and Inf as in `rank_norms`."""
        slots = sequences % self._layer_steps
        norms = self._layer_norms[slots].astype(np.float64)
        norms[~np.isfinite(norms)] = math.inf
        norms[self._layer_sequences[slots] != sequences] = math.nan
        return norms
