"""Assembles steps from the records of all ranks: many at once, since numpy takes as long for one as for a hundred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.batch import Rows, taken
from foreshock_collector.records.steps import Step, bounded
from foreshock_protos.columns import WIRE_COLUMNS, Part
from foreshock_protos.v1 import telemetry_pb2 as pb

_STEP_FIELDS = set(Step.__struct_fields__)
_MEASUREMENTS = tuple(
    column
    for column in WIRE_COLUMNS
    if column.part is not Part.REDUCED and column.gauge is not None and column.name not in _STEP_FIELDS
)
"""Columns that the collector exports and does nothing else with."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Reads the records of some steps, [steps, ranks], out of a ring buffer, [slots, ranks]."""

    cells: Rows
    columns: NDArray[np.int64]
    """Columns of the buffer, in the order of their ranks."""
    sequences: NDArray[np.int64]
    """Steps to read."""

    @cached_property
    def records(self) -> Rows:
        """The records: [steps, ranks]."""
        return taken(self.cells, (self.sequences % len(self.cells))[:, None], self.columns)

    def field(self, name: str) -> NDArray[Any]:
        """Return one field of the records."""
        return self.records[name]

    def complete(self) -> Mask:
        """Return which records are of their step, and finished; the others are of older steps, or empty."""
        present: Mask = self.field("sequence") == self.sequences[:, None]
        present &= self.field("flags") & pb.INCOMPLETE == 0
        return present


def assembled(attempt: int, ranks: Ranks, sums: Rows, world_size: int) -> list[Step | None]:
    """Return the steps; None where no rank has finished one, or where no step was made.

    sums: results of the steps' all-reduce, [steps]; of another step where no rank has sent it.
    """
    present = ranks.complete()
    if not present.any():
        return [None] * len(present)
    flags = ranks.field("flags")
    # Ranks hold the same averaged gradient: any view of it will do.
    known = present & (flags & pb.GRADIENT_UNKNOWN == 0)
    knows = known.any(axis=1)
    lowest = present.argmax(axis=1)
    first = _Chosen(ranks, np.where(knows, known.argmax(axis=1), lowest))
    flag = first.field("flags")
    norm = np.where(knows, first.field("global_norm"), math.nan)
    columns: dict[str, Sequence[Any]] = {
        "sequence": ranks.sequences.tolist(),
        "ranks": present.sum(axis=1).tolist(),
        "duration_seconds": _durations(ranks, lowest),
        "global_norm": norm.tolist(),
        "nan_gradient": (_any(ranks, present, "nan_parameters") | (knows & np.isnan(norm))).tolist(),
        "inf_gradient": (_any(ranks, present, "inf_parameters") | np.isinf(norm)).tolist(),
        "stepped": (flag & pb.NOT_STEPPED == 0).tolist(),
        "skipped": (flag & pb.SKIPPED != 0).tolist(),
        "shadow_clipped": (flag & pb.SHADOW_CLIPPED != 0).tolist(),
        "shadow_skipped": (flag & pb.SHADOW_SKIPPED != 0).tolist(),
        "measurements": _measurements(first),
    }
    for name in ("step", "wall_seconds", "learning_rate", "loss_scale", "clip_coefficient"):
        columns[name] = first.field(name).tolist()
    observed = present & (flags & pb.LOSS_OBSERVED != 0)
    columns |= _losses(ranks, observed, sums, missing=present.sum(axis=1) < world_size)
    steps = (
        Step(attempt=attempt, **dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    )
    # Some scripts drop gradients by design, such as those that flow through a GAN's other model: not a step.
    return [
        step if step.ranks and (step.stepped or step.nonfinite or step.loss is not None) else None for step in steps
    ]


@dataclass(frozen=True)
class _Chosen:
    """Reads the records of one rank for each step."""

    ranks: Ranks
    places: NDArray[np.int64]
    """Of that rank among all, [steps]."""

    @cached_property
    def records(self) -> Rows:
        """Its records: [steps]."""
        return taken(self.ranks.records, np.arange(len(self.places)), self.places)

    def field(self, name: str) -> NDArray[Any]:
        """Return one field of its records."""
        return self.records[name]

    def field_before(self, name: str) -> NDArray[Any]:
        """Return one field of its records of the steps before."""
        cells = self.ranks.cells
        return cells[name][(self.ranks.sequences - 1) % len(cells), self.ranks.columns[self.places]]


def _any(ranks: Ranks, present: Mask, kind: str) -> Mask:
    counted = (ranks.field(f"global_{kind}") > 0) | (ranks.field(f"local_{kind}") > 0)
    found: Mask = np.logical_or.reduce(present & counted, axis=1)
    return found


def _losses(ranks: Ranks, observed: Mask, sums: Rows, *, missing: Mask) -> dict[str, Sequence[Any]]:
    """Return the mean over ranks, or NaN or Inf if one rank's is that; and whether any loss is NaN, or Inf.

    missing: steps of which records of ranks are missing. The sums of the all-reduce include their losses.
    """
    loss = np.where(observed, ranks.field("loss"), 0.0)
    number = observed.sum(axis=1)
    summed = missing & (sums["reduced_sequence"] == ranks.sequences)
    nan = np.isnan(loss).any(axis=1) | (summed & (sums["reduced_nan_losses"] > 0))
    inf = np.isinf(loss).any(axis=1) | (summed & (sums["reduced_inf_losses"] > 0))
    # Divided before they are summed: finite losses must not add up to Inf.
    means = (loss / np.maximum(number, 1)[:, None]).sum(axis=1).tolist()
    found: list[float | None] = [mean if count else None for mean, count in zip(means, number.tolist(), strict=True)]
    for i in np.flatnonzero(summed & (sums["reduced_loss_count"] > number)).tolist():
        mean = bounded(float(sums["reduced_loss_sum"][i]) / float(sums["reduced_loss_count"][i]))
        found[i] = mean if math.isfinite(mean) else None
    for i in np.flatnonzero(nan | inf).tolist():
        found[i] = math.nan if nan[i] else math.inf
    return {"loss": found, "nan_loss": nan.tolist(), "inf_loss": inf.tolist()}


def _durations(ranks: Ranks, lowest: NDArray[np.int64]) -> list[float | None]:
    """Return the time since the step before, in seconds, by the clock of the lowest rank. lowest: its place."""
    rank = _Chosen(ranks, lowest)
    before = rank.field_before("sequence")
    # Sequence 0 is an empty cell, and no step before the first.
    follows = (before > 0) & (before == ranks.sequences - 1)
    seconds = rank.field("monotonic_seconds") - rank.field_before("monotonic_seconds")
    known = follows & (seconds > 0) & np.isfinite(seconds)
    return [each if is_known else None for each, is_known in zip(seconds.tolist(), known.tolist(), strict=True)]


def _measurements(first: _Chosen) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{} for _ in first.places]
    for column in _MEASUREMENTS:
        values = first.field(column.name)
        places = np.flatnonzero(values != column.missing) if column.optional else np.arange(len(values))
        for place, value in zip(places.tolist(), values[places].tolist(), strict=True):
            found[place][column.name] = value
    return found
