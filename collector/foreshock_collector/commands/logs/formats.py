"""Decides which reader claims a file."""

from __future__ import annotations

import csv
import math
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foreshock_collector.commands.logs.columns import Chunk, ColumnBuilder, Log, LogError
from foreshock_collector.commands.logs.json_rows import is_json, read_json
from foreshock_collector.commands.logs.source import Source, opened
from foreshock_collector.commands.logs.stores import (
    SQLITE_MAGIC,
    is_event_folder,
    is_mlflow_run,
    read_database,
    read_events,
    read_mlflow,
)
from foreshock_collector.commands.logs.tables import header_of, is_table, read_table
from foreshock_collector.commands.logs.text_lines import read_text
from foreshock_collector.state.database_file import StoreError

_PATHS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Iterator[Chunk]]], ...] = (
    (is_event_folder, read_events),
    (is_mlflow_run, read_mlflow),
)
"""Formats that are known by a path: who claims it, and who reads it."""
_TEXTS: tuple[tuple[Callable[[str], bool], Callable[[Source, ColumnBuilder], Iterator[Chunk]]], ...] = (
    (is_json, read_json),
    (is_table, lambda source, _: read_table(source)),
    (lambda _: True, read_text),
)
"""Formats that are known by the first characters, in order."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FILES = ("metrics.csv", "trainer_state.json", "trainer_log.jsonl", "logging.jsonl", "metrics.json", "log.txt")
"""Names by which tools write logs, to look for in a folder."""


def read_log(
    path: Path, *, run: str = "", columns: dict[str, str] | None = None, at: Callable[[int], None] = lambda _: None
) -> Log:
    """Read a file, a folder, or standard input for "-", in any supported format. Raises `LogError`.

    run: which run of a database, by default the newest. columns: names of columns by meaning; see `parse_columns`. at:
    called now and then with the number of rows that have been read.
    """
    builder = ColumnBuilder(str(path), columns or {}, run)
    with log_errors(path):
        for chunk in _chunks(path, run, builder):
            builder.add(chunk)
            at(builder.row_count)
        return builder.build()


@contextmanager
def log_errors(path: Path) -> Iterator[None]:
    """Turn what reading a log may raise into a `LogError` that names the file."""
    try:
        yield
    except LogError:
        raise
    except StoreError as error:
        raise LogError(str(error)) from error
    except (OSError, EOFError, ValueError, csv.Error, sqlite3.Error) as error:
        message = str(error)
        raise LogError(message if message.startswith(f"{path}:") else f"{path}: {message}") from error
    except RecursionError:
        raise LogError(f"{path}: nested too deeply to be a log") from None


def find_logs(path: Path) -> list[Path]:
    """Return the logs in a folder of runs, in order of their names; the path itself if it is a log."""
    if not path.is_dir() or any(claims(path) for claims, _ in _PATHS):
        return [path]
    folders = sorted(folder for folder in path.rglob("*") if folder.is_dir())
    runs = [folder for folder in folders if any(claims(folder) for claims, _ in _PATHS)]
    files = [file for name in _FILES for file in path.rglob(name)]
    return sorted([*runs, *_newest(files)]) or [path]


def _newest(files: list[Path]) -> list[Path]:
    """Return the files without those of older checkpoints: each checkpoint of a Trainer has the log up to its step."""
    newest: dict[Path, tuple[float, Path]] = {}
    for file in files:
        checkpoint = _CHECKPOINT.fullmatch(file.parent.name)
        run = file.parent.parent / file.name if checkpoint else file
        newest[run] = max(newest.get(run, (-1.0, file)), (float(checkpoint[1]) if checkpoint else math.inf, file))
    return [file for _, file in newest.values()]


def _chunks(path: Path, run: str, builder: ColumnBuilder) -> Iterator[Chunk]:
    for claims, read_path in _PATHS:
        if claims(path):
            yield from read_path(path)
            return
    if path.is_dir():
        raise LogError(f"{path}: no log in this folder: no event file, no run of MLflow, no {', '.join(_FILES)}")
    with opened(path) as source:
        if source.head.startswith(SQLITE_MAGIC):
            if not path.is_file():
                raise LogError(f"{path}: a database cannot be read from a pipe")
            yield from read_database(path, run)
            return
        yield from read_lines(source, builder)


def read_lines(source: Source, builder: ColumnBuilder) -> Iterator[Chunk]:
    """Yield the rows of a log of text, in the format that its first characters show. Raises `LogError`."""
    given = set(builder.names.given.values())
    if given & set(header_of(source.text)[0]) and not is_json(source.text):
        yield from read_table(source)
        return
    read = next(read for claims, read in _TEXTS if claims(source.text))
    try:
        yield from read(source, builder)
    finally:
        # It may have been meant as a table.
        if read is read_text and not builder.names.recognized:
            builder.names.note(header_of(source.text)[0])
