"""Reads recorded training logs: CSV, JSON lines, a Trainer's state, TensorBoard events, a Foreshock database.

Rows keep the order of the file. A value that was not logged is None; NaN and Inf are kept.
"""

from __future__ import annotations

import csv
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock_collector.state.history import History
from foreshock_collector.state.schema import StoreError

_NAMES = {
    "step": ("step", "global_step", "iteration", "iter", "trainer/global_step"),
    "loss": ("loss", "train_loss", "train/loss", "training_loss", "lm loss"),
    "norm": ("grad_norm", "gradient_norm", "global_norm", "total_norm", "train/grad_norm", "grad-norm"),
    "rate": ("lr", "learning_rate", "train/lr", "train/learning_rate", "learning-rate"),
}
"""Accepted names of each column; the first is the documented one."""
_MAGIC_SQLITE = b"SQLite format 3\0"


class LogError(ValueError):
    """The file cannot be read; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Holds one row of a log."""

    step: float
    loss: float | None
    norm: float | None
    """Global gradient norm, unscaled and before clipping."""
    rate: float | None
    """Learning rate."""


def read_log(path: Path, *, run: str = "") -> list[Row]:
    """Read a file in any supported format. run: which run of a database, by default the newest. Raises `LogError`."""
    try:
        rows = list(_rows(path, run))
    except LogError:
        raise
    except StoreError as error:
        raise LogError(str(error)) from error
    except (OSError, ValueError, csv.Error, sqlite3.Error) as error:
        raise LogError(f"{path}: {error}") from error
    except RecursionError:
        raise LogError(f"{path}: nested too deeply to be a log") from None
    if not rows:
        raise LogError(f"{path}: no rows")
    return rows


def _rows(path: Path, run: str) -> Iterator[Row]:
    if path.is_dir() or "tfevents" in path.name:
        return _tensorboard(path)
    with path.open("rb") as file:
        head = file.read(4096)
    return _database(path, run) if head.startswith(_MAGIC_SQLITE) else _text(path, head)


def _text(path: Path, head: bytes) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from _csv(path, text)
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(path, text)
        return
    if "log_history" in whole:
        yield from _trainer_state(path, whole["log_history"])
    else:
        yield from _json_lines(path, text)


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines())
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    _check_names(path, header)
    for number, line in enumerate(reader):
        cells = {name: cell for name, cell in line.items() if isinstance(cell, str) and cell.strip()}
        yield _row(f"{path}, data row {number}", cells, number)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {line_number}"
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise LogError(f"{where}: {error}") from error
        if not isinstance(cells, dict):
            raise LogError(f"{where}: expected an object")
        if number == 0:
            _check_names(path, cells)
        yield _row(where, cells, number)
        number += 1


def _trainer_state(path: Path, history: object) -> Iterator[Row]:
    """Hugging Face's `trainer_state.json`. Evaluation entries are not training steps."""
    if not isinstance(history, list):
        raise LogError(f"{path}: log_history is not a list")
    entries = [entry for entry in history if isinstance(entry, dict) and ("loss" in entry or "grad_norm" in entry)]
    learned = False
    for number, entry in enumerate(entries):
        row = _row(f"{path}, entry {number}", entry, number)
        # Its default filter (logging_nan_inf_filter) drops NaN steps from the mean; if all steps were NaN, 0.0 remains.
        # No cross entropy falls to exactly 0.0 in one step.
        silenced = row.loss == 0.0 and learned and not (row.norm is not None and 0 < row.norm < math.inf)
        learned = learned or (row.loss is not None and row.loss > 0)
        yield Row(step=row.step, loss=math.nan if silenced else row.loss, norm=row.norm, rate=row.rate)


def _tensorboard(path: Path) -> Iterator[Row]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError:
        raise LogError(f"{path}: TensorBoard files require tensorboard: pip install tensorboard") from None
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    found: dict[int, dict[str, float]] = {}
    scalars = set(accumulator.Tags()["scalars"])
    for column in ("loss", "norm", "rate"):
        tag = next((name for name in _NAMES[column] if name in scalars), None)
        for event in accumulator.Scalars(tag) if tag else ():
            found.setdefault(event.step, {})[column] = event.value
    if not any("loss" in cells or "norm" in cells for cells in found.values()):
        wanted = ", ".join((*_NAMES["loss"], *_NAMES["norm"]))
        raise LogError(f"{path}: none of the scalars {wanted}; found {', '.join(sorted(scalars)) or 'none'}")
    for step, cells in sorted(found.items()):
        yield Row(step=step, loss=cells.get("loss"), norm=cells.get("norm"), rate=cells.get("rate"))


def _database(path: Path, run: str) -> Iterator[Row]:
    with closing(History.open(path)) as history:
        runs = history.runs()
        if not runs or (run and run not in runs):
            raise LogError(f"{path}: no run {run!r}; found {', '.join(runs) or 'none'}")
        for step, loss, norm, rate in history.log(run or runs[-1]):
            yield Row(step=step, loss=loss, norm=norm, rate=rate)


def _check_names(path: Path, names: Iterable[str]) -> None:
    known = set(names)
    if not known.intersection((*_NAMES["loss"], *_NAMES["norm"])):
        raise LogError(
            f"{path}: neither a loss nor a gradient norm; expected columns step,loss,grad_norm[,lr], "
            f"found {','.join(sorted(known)) or 'none'}"
        )


def _row(where: str, cells: Mapping[str, Any], number: int) -> Row:
    values = {column: _number(where, cells, names) for column, names in _NAMES.items()}
    step = values.pop("step")
    return Row(step=number if step is None else step, loss=values["loss"], norm=values["norm"], rate=values["rate"])


def _number(where: str, cells: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        if (value := cells.get(name)) is not None:
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                raise LogError(f"{where}: {name} is {str(value)[:80]!r}, not a number") from None
    return None
