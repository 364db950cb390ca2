"""Collects what a reader found into columns: evaluation rows are left aside, repeats and parts of a row are joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.commands.logs.names import Names

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
_NOT_LOGGED = {"", "-", "--", "?", "n/a", "na", "nil", "none", "null", "undefined"}
"""Texts, in lower case, that stand for a value that was not logged."""


class LogError(ValueError):
    """Reports a file that cannot be read; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Holds one row of a log."""

    step: float
    loss: float | None
    norm: float | None
    """Global gradient norm, unscaled and before clipping."""
    rate: float | None
    """Learning rate."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Log:
    """Holds the training rows of a log in columns of equal length, in the order of the file."""

    step: Floats
    loss: Floats
    """NaN where the loss was not logged, or is NaN; `loss_logged` tells them apart."""
    norm: Floats
    """Global gradient norm, unscaled and before clipping. NaN where it was not logged, or is NaN."""
    rate: Floats
    """Learning rate; NaN where it was not logged."""
    loss_logged: Flags
    norm_logged: Flags
    by_epoch: bool = False
    """Whether each row stands for an epoch, whose number is then in `step`."""
    empty_rows: int = 0
    """Rows at the end that have neither a loss nor a norm, though the rows before had; they are not in the columns."""
    unread_lines: int = 0
    """Torn or foreign lines that were left out, other than a torn last one."""

    def with_rows(self, more: Log) -> Log:
        """Return a log of these rows and then those."""
        return replace(
            more,
            step=np.concatenate((self.step, more.step)),
            loss=np.concatenate((self.loss, more.loss)),
            norm=np.concatenate((self.norm, more.norm)),
            rate=np.concatenate((self.rate, more.rate)),
            loss_logged=np.concatenate((self.loss_logged, more.loss_logged)),
            norm_logged=np.concatenate((self.norm_logged, more.norm_logged)),
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> Self:
        """Build a log from rows as they are, without joining or dropping any."""
        return cls(
            step=np.array([row.step for row in rows], float),
            loss=np.array([row.loss for row in rows], float),
            norm=np.array([row.norm for row in rows], float),
            rate=np.array([row.rate for row in rows], float),
            loss_logged=np.array([row.loss is not None for row in rows], bool),
            norm_logged=np.array([row.norm is not None for row in rows], bool),
        )

    def __len__(self) -> int:
        return len(self.step)

    def rows(self) -> list[Row]:
        """Return the rows one by one, with None for a value that was not logged."""
        rates = (None if math.isnan(rate) else rate for rate in self.rate.tolist())
        losses, norms = values_or_none(self.loss, self.loss_logged), values_or_none(self.norm, self.norm_logged)
        return [
            Row(step=step, loss=loss, norm=norm, rate=rate)
            for step, loss, norm, rate in zip(self.step.tolist(), losses, norms, rates, strict=True)
        ]


def values_or_none(values: Floats, logged: Flags) -> list[float | None]:
    """Return the values as a list, with None where they were not logged."""
    return [value if is_logged else None for value, is_logged in zip(values.tolist(), logged.tolist(), strict=True)]


class Chunk(Protocol):
    """Holds some consecutive rows of a log as they stand in the file."""

    @property
    def fields(self) -> Iterable[str]:
        """Names of all columns."""

    def column(self, name: str) -> Sequence[Any] | Floats:
        """Return one column: numbers, or text, or None where a row has no value."""

    def empty(self, row: int, names: Names) -> bool:
        """Return whether a row without loss and norm was meant to have them. An evaluation row was not."""

    def where(self, row: int) -> str:
        """Return the place of a row in the file, for an error message."""


class ColumnBuilder:
    """Collects chunks and makes a log of them."""

    def __init__(self, name: str, given: dict[str, str], run: str = "") -> None:
        """name: how messages call the file. given: names of columns that the user chose, by their meaning. run: of
        which run, if columns of several are there.
        """
        self._name = name
        self.names = Names(given, run)
        self.unread_lines = 0
        self._parts: list[tuple[Floats, Floats, Floats, Floats, Floats, Flags, Flags]] = []
        self._empty_rows = 0
        self.row_count = 0
        """Number of training rows."""

    def add(self, chunk: Chunk) -> None:
        """Add the training rows of a chunk. Raises `LogError` if a value is not a number."""
        names = self.names
        names.add(chunk.fields)
        loss, loss_logged = self._numbers(chunk, names.loss)
        norm, norm_logged = self._numbers(chunk, names.norm)
        step, _ = self._numbers(chunk, names.step)
        epoch, _ = self._numbers(chunk, names.epoch)
        rate, _ = self._numbers(chunk, names.rate)
        count = max(len(loss), len(norm), len(step))
        if not count:
            return
        step, epoch, loss, norm, rate = (
            column if len(column) else np.full(count, math.nan) for column in (step, epoch, loss, norm, rate)
        )
        loss_logged, norm_logged = (
            flags if len(flags) else np.zeros(count, bool) for flags in (loss_logged, norm_logged)
        )
        kept = loss_logged | norm_logged
        if not kept.all():
            self._count_empty(chunk, kept)
        elif count:
            self._empty_rows = 0
        self.row_count += int(kept.sum())
        self._parts.append(
            (step[kept], epoch[kept], loss[kept], norm[kept], rate[kept], loss_logged[kept], norm_logged[kept])
        )

    def build(self) -> Log:
        """Return the log. Raises `LogError` if no row has a loss or a norm."""
        self.names.check(self._name)
        log = self.take(0)
        if log is None:
            raise LogError(f"{self._name}: no rows")
        return log

    def take(self, first: int) -> Log | None:
        """Return the rows since the last call; None if there are none. first: number of the first row."""
        if not self.row_count:
            return None
        step, epoch, loss, norm, rate, loss_logged, norm_logged = map(np.concatenate, zip(*self._parts, strict=True))
        self._parts, self.row_count = [], 0
        # A step may be anything that is a number, such as Inf.
        with np.errstate(all="ignore"):
            by_epoch = self.names.step is None and _counts_epochs(epoch)
            steps = epoch if by_epoch else _steps(step, epoch, first)
        if self.names.silences_nan:
            loss = _with_silenced_nan(loss, norm, norm_logged)
        log = Log(
            step=steps,
            loss=loss,
            norm=norm,
            rate=rate,
            loss_logged=loss_logged,
            norm_logged=norm_logged,
            by_epoch=by_epoch,
            empty_rows=self._empty_rows,
            unread_lines=self.unread_lines,
        )
        return log if self.names.step is None else _without_repeats(_joined(log))

    def _count_empty(self, chunk: Chunk, kept: Flags) -> None:
        last = int(np.flatnonzero(kept)[-1]) if kept.any() else -1
        before = 0 if last >= 0 else self._empty_rows
        self._empty_rows = before + sum(chunk.empty(row, self.names) for row in range(last + 1, len(kept)))

    def _numbers(self, chunk: Chunk, name: str | None) -> tuple[Floats, Flags]:
        """Return a column and where it was logged; empty arrays if there is no such column."""
        if name is None:
            return np.empty(0), np.empty(0, bool)
        cells = chunk.column(name)
        if isinstance(cells, np.ndarray):
            return cells, np.ones(len(cells), bool)
        try:
            values = np.fromiter(map(float, cells), float, len(cells))
        except (TypeError, ValueError, OverflowError):
            found = [self._number(cell, chunk, row, name) for row, cell in enumerate(cells)]
            return np.array(found, float), np.array([value is not None for value in found], bool)
        return values, np.ones(len(values), bool)

    def _number(self, cell: Any, chunk: Chunk, row: int, name: str) -> float | None:
        if cell is None:
            return None
        try:
            return float(cell)
        except (TypeError, ValueError, OverflowError):
            text = cell.strip() if isinstance(cell, str) else ""
        if isinstance(cell, str) and text.lower() in _NOT_LOGGED:
            return None
        # "step/steps in all", as ms-swift writes it; a decimal comma, as spreadsheets of some countries write it.
        for candidate in (text.partition("/")[0] if name == self.names.step else "", text.replace(",", ".", 1)):
            try:
                return float(candidate)
            except ValueError:
                continue
        raise LogError(f"{self._name}, {chunk.where(row)}: {name} is {str(cell).strip()[:80]!r}, not a number")


def _counts_epochs(epoch: Floats) -> bool:
    """Return whether each row is a further epoch. A fraction of an epoch, or several rows in one, is none."""
    return len(epoch) > 1 and bool((epoch == np.floor(epoch)).all() and (np.diff(epoch) > 0).all())


def _steps(step: Floats, epoch: Floats, first: int) -> Floats:
    """Return a step for each row: its own, else the one before, else its number in the log."""
    missing = np.isnan(step)
    if missing.all():
        return np.arange(first, first + len(step), dtype=float)
    if missing.any():
        before = np.maximum.accumulate(np.where(missing, -1, np.arange(len(step))))
        step = np.where(before >= 0, step[before], 0.0)
    # A step that begins again with each epoch, as iterations do in mmdet's logs, goes on where the epoch before ended.
    begins = (np.diff(step, prepend=step[0]) < 0) & (np.diff(epoch, prepend=epoch[0]) > 0)
    if not begins.any():
        return step
    ends = np.where(begins, np.concatenate(([0.0], step[:-1])), 0.0)
    return np.asarray(step + np.cumsum(ends))


def _with_silenced_nan(loss: Floats, norm: Floats, norm_logged: Flags) -> Floats:
    """Return the losses with NaN where Hugging Face's Trainer replaced it by 0.0.

    Its default filter (logging_nan_inf_filter) drops NaN steps from the mean; if all were NaN, 0.0 remains. No cross
    entropy falls to exactly 0.0 in one step; one whose gradient is 0.0 too may be real (GRPO without any advantage).
    """
    learned = np.maximum.accumulate(loss > 0)
    silenced = (loss == 0.0) & np.where(norm_logged, ~np.isfinite(norm), learned)
    return np.where(silenced, math.nan, loss)


def _joined(log: Log) -> Log:
    """Join neighboring rows of one step of which one has the loss and the other the norm."""
    same = log.step[1:] == log.step[:-1]
    parts = same & ~(log.loss_logged[1:] & log.loss_logged[:-1]) & ~(log.norm_logged[1:] & log.norm_logged[:-1])
    if not parts.any():
        return log
    second = np.concatenate(([False], parts))
    second[1:] &= ~second[:-1]
    first = np.flatnonzero(second) - 1
    loss, norm, rate = log.loss.copy(), log.norm.copy(), log.rate.copy()
    for column in (loss, norm, rate):
        column[first] = np.where(np.isnan(column[first]), column[first + 1], column[first])
    loss_logged, norm_logged = log.loss_logged.copy(), log.norm_logged.copy()
    for flags in (loss_logged, norm_logged):
        flags[first] |= flags[first + 1]
    return _chosen(log, ~second, loss, norm, rate, loss_logged, norm_logged)


def _without_repeats(log: Log) -> Log:
    """Drop rows that repeat the row before: some scripts print each row once on every rank."""
    columns = (log.step, log.loss, log.norm)
    same = np.logical_and.reduce([(c[1:] == c[:-1]) | (np.isnan(c[1:]) & np.isnan(c[:-1])) for c in columns])
    if not same.any():
        return log
    kept = np.concatenate(([True], ~same))
    return _chosen(log, kept, log.loss, log.norm, log.rate, log.loss_logged, log.norm_logged)


def _chosen(
    log: Log, kept: Flags, loss: Floats, norm: Floats, rate: Floats, loss_logged: Flags, norm_logged: Flags
) -> Log:
    return Log(
        step=log.step[kept],
        loss=loss[kept],
        norm=norm[kept],
        rate=rate[kept],
        loss_logged=loss_logged[kept],
        norm_logged=norm_logged[kept],
        by_epoch=log.by_epoch,
        empty_rows=log.empty_rows,
        unread_lines=log.unread_lines,
    )
