"""Norms by rank or by layer over steps, downsampled to what a screen can show: a cell is the largest of its block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.steps import kind_of
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import Attempt

MOST_ROWS = 128
"""More ranks or layers share rows: a row of fewer than two pixels says nothing."""


def at_hand(attempt: Attempt, by: str, *, first: int, last: int, columns: int) -> dict[str, Any]:
    """Of an attempt whose records are still in memory. by: "ranks" or "layers"."""
    buffer = attempt.buffer
    first = max(first, attempt.finalized - buffer.capacity + 1, 1)
    sequences = np.arange(first, min(last, attempt.finalized) + 1)
    if by == "layers":
        return downsampled(sequences, attempt.model.layers, buffer.layer_norms_of(sequences), columns=columns)
    names = [str(rank) for rank in range(attempt.world_size)]
    return downsampled(sequences, names, buffer.rank_norms(sequences), columns=columns)


def around_incident(
    window: Window | None, layers: Sequence[str], by: str, *, first: int, last: int, columns: int
) -> dict[str, Any]:
    """Of the records that are kept for good; empty without a window. by: "ranks" or "layers"."""
    if window is None:
        return downsampled(np.zeros(0, np.int64), [], np.zeros((0, 0)), columns=columns)
    asked = (window.sequences >= first) & (window.sequences <= last)
    if by == "layers":
        norms = window.layer_norms[asked].astype(np.float64)
        return downsampled(window.sequences[asked], layers, norms, columns=columns)
    rows = window.records[np.isin(window.records["sequence"], window.sequences[asked])]
    sequences, steps = np.unique(rows["sequence"], return_inverse=True)
    ranks, places = np.unique(rows["rank"], return_inverse=True)
    table = np.full((len(sequences), len(ranks)), math.nan)
    bad = (rows["local_nan_parameters"] > 0) | (rows["local_inf_parameters"] > 0)
    table[steps, places] = np.where(np.isfinite(rows["local_norm"]) & ~bad, rows["local_norm"], math.inf)
    return downsampled(sequences, [str(rank) for rank in ranks], table, columns=columns)


def downsampled(
    sequences: NDArray[np.int64], names: Sequence[str], table: NDArray[np.float64], *, columns: int
) -> dict[str, Any]:
    """table: [steps, rows], NaN where nothing is known, Inf where it is not finite.

    Returns `sequence`, the first of each column, `bin_width`, the steps of a column, `rows`, their names, and `values`
    [row][column]: null where nothing is known, "inf" where it is not finite.
    """
    known = ~np.isnan(table).all(axis=1) if table.size else np.zeros(len(sequences), np.bool_)
    # What came before local norms, or before this collector, is no part of the picture.
    start = int(known.argmax()) if known.any() else len(sequences)
    sequences, table = sequences[start:], table[start:]
    bin_width = max(1, -(-len(sequences) // columns))
    group = max(1, -(-len(names) // MOST_ROWS))
    values: list[list[Any]] = []
    starts, tops = np.arange(0, len(sequences), bin_width), np.arange(0, len(names), group)
    if table.size:
        blocks = np.fmax.reduceat(np.fmax.reduceat(table, starts, axis=0), tops, axis=1)
        values = [[_json_value(value) for value in row] for row in blocks.T.tolist()]
    rows = [_range(names[top : top + group]) for top in tops.tolist()]
    return {"sequence": sequences[starts].tolist(), "bin_width": bin_width, "rows": rows, "values": values}


def _json_value(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return kind_of(value) or float(f"{value:.4g}")


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
