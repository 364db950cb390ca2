"""Reads what trackers store: TensorBoard's event files, MLflow's folders, the databases of trackio and Foreshock."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from foreshock_collector.commands.logs.columns import Chunk, LogError
from foreshock_collector.commands.logs.json_rows import ObjectRows, decoded
from foreshock_collector.state.history import History

SQLITE_MAGIC = b"SQLite format 3\0"
_EVENTS = "*tfevents*"
_REAL = "fiu"
"""Kinds of numpy's types that are real numbers."""


def is_event_folder(path: Path) -> bool:
    """Return whether a path is an event file, or a folder that holds some."""
    return any(path.glob(_EVENTS)) if path.is_dir() else "tfevents" in path.name


def is_mlflow_run(path: Path) -> bool:
    """Return whether a path is the folder of one run in MLflow's file store."""
    return (path / "metrics").is_dir() and (path / "meta.yaml").is_file()


def read_events(path: Path) -> Iterator[Chunk]:
    """Yield the scalars of TensorBoard, both simple values and tensors, by step. Raises `LogError`."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError:
        raise LogError(f"{path}: TensorBoard files require tensorboard: pip install tensorboard") from None
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    series = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        arrays = ((event.step, make_ndarray(event.tensor_proto)) for event in accumulator.Tensors(tag))
        values = [
            (step, float(array.reshape(()))) for step, array in arrays if array.size == 1 and array.dtype.kind in _REAL
        ]
        if values:
            series.setdefault(tag, []).extend(values)
    yield _by_step(series)


def read_mlflow(path: Path) -> Iterator[Chunk]:
    """Yield the metrics of one run in MLflow's file store: a file each, with "milliseconds value step" on each line."""
    folder, series = path / "metrics", {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        rows = [line.split() for line in file.read_text("utf-8").splitlines()]
        values = [(int(row[2]) if len(row) > 2 else i, float(row[1])) for i, row in enumerate(rows) if len(row) > 1]
        series[file.relative_to(folder).as_posix()] = values
    yield _by_step(series)


def read_database(path: Path, run: str) -> Iterator[Chunk]:
    """Yield the steps of one run of Foreshock's or trackio's database, by default the newest. Raises `LogError`."""
    yield _trackio(path, run) if _is_trackio(path) else _foreshock(path, run)


def _is_trackio(path: Path) -> bool:
    # Only the schema is read, without the files that a reader of a live database leaves beside it.
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        columns = {name for _, name, *_ in database.execute("PRAGMA table_info(metrics)")}
    return {"run_name", "step", "metrics"} <= columns


def _trackio(path: Path, run: str) -> ObjectRows:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        runs = database.execute("SELECT run_name FROM metrics GROUP BY run_name ORDER BY max(id)")
        chosen = _chosen(path, [name for (name,) in runs], run)
        query = "SELECT step, metrics FROM metrics WHERE run_name=? ORDER BY id"
        rows = [{**decoded(text), "step": step} for step, text in database.execute(query, (chosen,))]
    return ObjectRows(rows, 0, "entry")


def _foreshock(path: Path, run: str) -> ObjectRows:
    with closing(History.open(path)) as history:
        names = ("step", "loss", "grad_norm", "lr")
        steps = history.log(_chosen(path, history.runs(), run))
        return ObjectRows([dict(zip(names, step, strict=True)) for step in steps], 0, "step")


def _chosen(path: Path, names: list[str], run: str) -> str:
    if not names or (run and run not in names):
        raise LogError(f"{path}: no run {run!r}; found {', '.join(names) or 'none'}")
    return run or names[-1]


def _by_step(series: dict[str, list[tuple[int, float]]]) -> ObjectRows:
    """Return a row for each step, in order."""
    found: dict[int, dict[str, Any]] = {}
    for name, values in series.items():
        for step, value in values:
            found.setdefault(step, {"step": step})[name] = value
    rows = [found[step] for step in sorted(found)]
    return ObjectRows(rows or [dict.fromkeys(series)], 0, "step")
