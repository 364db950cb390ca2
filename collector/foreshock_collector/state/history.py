"""Queries of a database's steps, for the page and for `foreshock diagnose`."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from foreshock_collector.records.steps import finite
from foreshock_collector.records.window import Window
from foreshock_collector.state.encoding import decode
from foreshock_collector.state.schema import open_read_only

_VALUES = (
    *("sequence", "step", "wall_seconds", "duration_seconds", "learning_rate", "loss", "loss_scale", "global_norm"),
    *("clip_coefficient", "skipped"),
)
_SHOWN = ", ".join((*_VALUES, "nan_loss", "inf_loss", "nan_gradient", "inf_gradient"))
_MEASURED = ("update_ratio", "parameter_norm", "first_moment_norm", "second_moment_norm")
"""Measurements that a chart may show, in addition to the columns above."""


class History:
    """Reads the steps and the incidents' records of a database."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        # What typeshed asks of an aggregate is wider than what it does with one.
        database.create_aggregate("largest_update", 1, _LargestUpdate)  # type: ignore[arg-type]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file for reading; see `open_read_only`. Raises `StoreError`."""
        return cls(open_read_only(path))

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def runs(self) -> list[str]:
        """Names of all runs, the one that was stored last at the end."""
        return [name for (name,) in self._db.execute("SELECT run FROM runs ORDER BY rowid")]

    def log(self, run: str) -> Iterator[tuple[int, float | None, float | None, float]]:
        """Step, loss, global norm and learning rate of each step of a run, over all its attempts; None: not known."""
        columns = "step, loss, global_norm, learning_rate, nan_loss, inf_loss, nan_gradient, inf_gradient"
        query = f"SELECT {columns} FROM steps WHERE run=? ORDER BY attempt, sequence"  # noqa: S608
        for step, loss, norm, rate, *bad in self._db.execute(query, (run,)):
            yield step, _value(loss, *bad[:2]), _value(norm, *bad[2:]), float(rate)

    def steps(self, run: str, *, attempt: int, after: int, limit: int) -> dict[str, list[Any]]:
        """Columns of an attempt's steps, after a sequence number; null in those that were not measured at a step.

        Null where a value is not finite; then `loss_nonfinite` or `gradient_nonfinite` says "nan" or "inf".
        """
        where = "run=? AND attempt=? AND sequence>?"
        query = f"SELECT {_SHOWN}, measurements FROM steps WHERE {where} ORDER BY sequence LIMIT ?"  # noqa: S608
        return _columns(self._db.execute(query, (run, attempt, after, limit)).fetchall())

    def peaks(self, run: str, *, attempt: int, first: int, last: int, bin_width: int) -> dict[str, list[Any]]:
        """The same, of each `bin_width` steps the one with the largest norm; one that is not finite is the largest.

        Columns that are measured on some steps only are those of the largest update in the bin.
        """
        # With a single max(), SQLite takes the other columns from the row that has it; a text is above all numbers.
        bad = "nan_loss OR inf_loss OR nan_gradient OR inf_gradient"
        peak = f"max(CASE WHEN {bad} THEN 'bad' ELSE global_norm END)"
        shown = f"{_SHOWN}, largest_update(measurements), {peak}"
        where = "run=? AND attempt=? AND sequence BETWEEN ? AND ?"
        query = f"SELECT {shown} FROM steps WHERE {where} GROUP BY (sequence - 1) / ? ORDER BY sequence"  # noqa: S608
        return _columns(self._db.execute(query, (run, attempt, first, last, bin_width)).fetchall())

    def incident_window(self, run: str, number: int) -> Window | None:
        """The records before an incident; None if it has none."""
        found = self._db.execute("SELECT window FROM incidents WHERE run=? AND id=?", (run, number)).fetchone()
        return Window.from_bytes(found[0]) if found and found[0] else None


class _LargestUpdate:
    """Aggregates the measurements of several steps to those with the largest update ratio, as they are stored."""

    def __init__(self) -> None:
        self._largest: tuple[float, bytes | None] = (-1.0, None)

    def step(self, measurements: bytes | None) -> None:
        """Take one step's."""
        if measurements is not None:
            ratio = decode(measurements, dict[str, float]).get("update_ratio", 0.0)
            # A ratio that is not finite is larger than all others.
            self._largest = max(
                self._largest, (ratio if math.isfinite(ratio) else math.inf, measurements), key=itemgetter(0)
            )

    def finalize(self) -> bytes | None:
        """Return the measurements; None if no step has any."""
        return self._largest[1]


def number_of(column: Any) -> Any:
    """Return the value of a step's column. NaN and Inf are stored as text: SQLite has no NaN."""
    return float(column) if column in ("nan", "inf") else column


def _columns(rows: list[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: [finite(number_of(row[i])) for row in rows] for i, name in enumerate(_VALUES)
    }
    first = len(_VALUES)
    columns["skipped"] = [bool(skipped) for skipped in columns["skipped"]]
    columns["loss_nonfinite"] = [_kind(row[first], row[first + 1]) for row in rows]
    columns["gradient_nonfinite"] = [_kind(row[first + 2], row[first + 3]) for row in rows]
    measured = [decode(row[first + 4], dict[str, float]) if row[first + 4] else {} for row in rows]
    return columns | {name: [finite(each.get(name)) for each in measured] for name in _MEASURED}


def _kind(nan: int, inf: int) -> str:
    return "nan" if nan else "inf" if inf else ""


def _value(value: float | str | None, nan: int, inf: int) -> float | None:
    if nan or inf:
        return float(_kind(nan, inf))
    return None if value is None else float(value)
