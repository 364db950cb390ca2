"""Norms by rank or layer and updates by layer, over steps, downsampled to what a screen can show.

A cell is the largest of its block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.layer_weights import LayerWeights
from foreshock_collector.records.steps import kind_of
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import Attempt
from foreshock_protos.columns import WEIGHT_BLOCKS

MOST_ROWS = 128
"""More ranks or layers share rows: a row of less than two pixels shows nothing."""
CARRIED_STEPS = 25
"""Updates are measured on every tenth or twenty-fifth step: so long a measurement stays the newest."""


def newest_norms(attempt: Attempt, by: str, *, first: int, last: int, columns: int) -> dict[str, Any]:
    """Return the newest norms of an attempt whose records are in memory. by: "ranks", "layers" or "updates"."""
    buffer = attempt.buffer
    first = max(first, attempt.finalized - buffer.capacity + 1, 1)
    sequences = np.arange(first, min(last, attempt.finalized) + 1)
    if by == "layers":
        return downsample(sequences, attempt.model.layers, buffer.layer_norms_of(sequences), columns=columns)
    if by == "updates":
        weights = buffer.weights.between(first - CARRIED_STEPS, min(last, attempt.finalized))
        return downsample(sequences, attempt.model.layers, carried_forward(weights, sequences), columns=columns)
    names = [str(rank) for rank in range(attempt.world_size)]
    return downsample(sequences, names, buffer.rank_norms(sequences), columns=columns)


def incident_norms(
    window: Window | None, layers: Sequence[str], by: str, *, first: int, last: int, columns: int
) -> dict[str, Any]:
    """Return the norms stored with an incident; empty without a window. by: "ranks", "layers" or "updates"."""
    if window is None:
        return downsample(np.zeros(0, np.int64), [], np.zeros((0, 0)), columns=columns)
    selected = (window.sequences >= first) & (window.sequences <= last)
    if by == "layers":
        norms = window.layer_norms[selected].astype(np.float64)
        return downsample(window.sequences[selected], layers, norms, columns=columns)
    if by == "updates":
        updates = carried_forward(window.weights, window.sequences[selected])
        return downsample(window.sequences[selected], layers, updates, columns=columns)
    rows = window.records[np.isin(window.records["sequence"], window.sequences[selected])]
    sequences, steps = np.unique(rows["sequence"], return_inverse=True)
    ranks, columns_of_ranks = np.unique(rows["rank"], return_inverse=True)
    table = np.full((len(sequences), len(ranks)), math.nan)
    nonfinite = (rows["local_nan_parameters"] > 0) | (rows["local_inf_parameters"] > 0)
    table[steps, columns_of_ranks] = np.where(
        np.isfinite(rows["local_norm"]) & ~nonfinite, rows["local_norm"], math.inf
    )
    return downsample(sequences, [str(rank) for rank in ranks], table, columns=columns)


def carried_forward(weights: LayerWeights, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return update ratios by layer at each of these steps, [steps, layers]: those of the newest step that measured
    them, unless that is too long ago; then NaN. Inf where one is not finite.
    """
    ratios = weights.block("update_layer_ratios")
    known = (weights.blocks[:, WEIGHT_BLOCKS.index("update_layer_ratios")] != 0).any(axis=1)
    ratios = np.where(np.isnan(ratios) | np.isfinite(ratios), ratios, math.inf)[known]
    measured = weights.sequences[known]
    newest = np.searchsorted(measured, sequences, side="right") - 1
    table = np.full((len(sequences), ratios.shape[1]), math.nan)
    recent = newest >= 0
    recent[recent] = sequences[recent] - measured[newest[recent]] < CARRIED_STEPS
    table[recent] = ratios[newest[recent]]
    return table


def downsample(
    sequences: NDArray[np.int64], names: Sequence[str], table: NDArray[np.float64], *, columns: int
) -> dict[str, Any]:
    """Reduce a table [steps, rows], with NaN for unknown and Inf for non-finite norms, to so many columns.

    Returns `sequence`, the first of each column, `bin_width`, the steps of a column, `rows`, their names, and `values`
    [row][column]: null where nothing is known, "inf" where it is not finite.
    """
    known = ~np.isnan(table).all(axis=1) if table.size else np.zeros(len(sequences), np.bool_)
    # Steps before the first known norm are left out: there was no hook yet, or another collector.
    start = int(known.argmax()) if known.any() else len(sequences)
    sequences, table = sequences[start:], table[start:]
    bin_width = max(1, -(-len(sequences) // columns))
    group = max(1, -(-len(names) // MOST_ROWS))
    values: list[list[Any]] = []
    starts, tops = np.arange(0, len(sequences), bin_width), np.arange(0, len(names), group)
    if table.size:
        blocks = np.fmax.reduceat(np.fmax.reduceat(table, starts, axis=0), tops, axis=1)
        values = [[_json_value(value) for value in row] for row in blocks.T.tolist()]
    rows = [_row_name(names[top : top + group]) for top in tops.tolist()]
    return {"sequence": sequences[starts].tolist(), "bin_width": bin_width, "rows": rows, "values": values}


def _json_value(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return kind_of(value) or float(f"{value:.4g}")


def _row_name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
