"""What survives: SQLite in WAL mode, one writer. A commit holds the steps and the counters that they moved together.

`synchronous=NORMAL`: a killed process loses nothing that was committed. A power cut may lose the last commits, as a
whole; their records are sent again by the recorders if the ranks still run.
"""

from __future__ import annotations

import json
import math
import sqlite3
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foreshock_collector.runs import WINDOW_STEPS, Instance, Run, Runs
from foreshock_collector.steps import Step
from foreshock_protos.v1 import telemetry_pb2 as pb

SCHEMA = 1
_APPLICATION = 0x464F5245  # "FORE"
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (run TEXT PRIMARY KEY, snapshot TEXT NOT NULL);
CREATE TABLE instances (
  instance TEXT PRIMARY KEY, run TEXT NOT NULL, attempt INTEGER NOT NULL, hello BLOB NOT NULL,
  position INTEGER NOT NULL, closed TEXT NOT NULL, lost INTEGER NOT NULL, last_report REAL NOT NULL,
  dropped TEXT NOT NULL);
CREATE TABLE steps (
  run TEXT NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL, wall_seconds REAL, loss REAL, loss_nonfinite TEXT,
  global_norm REAL, gradient_nonfinite TEXT, clip_coefficient REAL, learning_rate REAL, loss_scale REAL,
  PRIMARY KEY (run, attempt, step)) WITHOUT ROWID;
CREATE TABLE rank_window (
  id INTEGER PRIMARY KEY, run TEXT NOT NULL, instance TEXT NOT NULL, last_step INTEGER NOT NULL, batch BLOB NOT NULL);
CREATE INDEX rank_window_by_instance ON rank_window (instance, last_step);
"""


class StoreError(ValueError):
    """The file is not a database that this collector can use."""


class Store:
    """The database of one collector."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            application = self._db.execute("PRAGMA application_id").fetchone()[0]
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        except sqlite3.Error as error:
            raise StoreError(f"database {path} cannot be used: {error}") from error
        if not tables:
            self._db.executescript(
                f"BEGIN; {_TABLES} PRAGMA application_id={_APPLICATION}; PRAGMA user_version={SCHEMA}; COMMIT;"
            )
            self._db.execute("INSERT INTO meta VALUES ('epoch', ?)", (uuid.uuid4().hex,))
        elif application != _APPLICATION:
            raise StoreError(f"database {path} is not a Foreshock database; give another path")
        elif version != SCHEMA:
            raise StoreError(f"database {path} has schema {version}, this collector knows {SCHEMA}; give another path")
        self.epoch: str = self._db.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()[0]

    def commit(self, run: Run, steps: Iterable[Step], batches: Iterable[tuple[Instance, pb.StepBatch]]) -> None:
        """Everything about a run since the last commit, at once or not at all."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO steps VALUES (?,?,?,?,?,?,?,?,?,?,?)", [
                (run.name, s.attempt, s.step, s.wall_seconds, _finite(s.loss), _kind(s.loss), _finite(s.global_norm),
                 "nan" if s.nan_gradient else "inf" if s.inf_gradient else "", s.clip_coefficient,
                 _finite(s.learning_rate), s.loss_scale) for s in steps
            ])  # fmt: skip
            for instance, batch in batches:
                if not batch.step:
                    continue
                self._db.execute(
                    "INSERT INTO rank_window (run, instance, last_step, batch) VALUES (?,?,?,?)",
                    (run.name, instance.hello.instance, max(batch.step), batch.SerializeToString()),
                )
                self._db.execute(
                    "DELETE FROM rank_window WHERE instance = ? AND last_step < ?",
                    (instance.hello.instance, max(batch.step) - WINDOW_STEPS),
                )
            self._db.executemany("INSERT OR REPLACE INTO instances VALUES (?,?,?,?,?,?,?,?,?)", [
                (i.hello.instance, run.name, i.attempt, i.hello.SerializeToString(), i.position, i.closed, i.lost,
                 i.last_report, json.dumps(i.dropped)) for i in run.instances.values()
            ])  # fmt: skip
            snapshot = json.dumps(run.snapshot(), allow_nan=False)
            self._db.execute("INSERT OR REPLACE INTO runs VALUES (?,?)", (run.name, snapshot))

    def load(self, now: float) -> Runs:
        """All runs, as they were committed."""
        runs = Runs()
        for name, snapshot in self._db.execute("SELECT run, snapshot FROM runs ORDER BY rowid"):
            runs.add(Run.restored(name, json.loads(snapshot)))
        for row in self._db.execute(
            "SELECT run, hello, position, closed, lost, last_report, dropped FROM instances ORDER BY attempt, rowid"
        ):
            name, hello, position, closed, lost, last_report, dropped = row
            instance = runs.greet(pb.Hello.FromString(hello), last_report)
            instance.position, instance.closed, instance.lost = position, closed, bool(lost)
            instance.dropped = json.loads(dropped)
        for name, data in self._db.execute("SELECT run, batch FROM rank_window ORDER BY id"):
            run = runs.get(name)
            assert run is not None
            run.recall(pb.StepBatch.FromString(data), now)
        return runs

    def steps(self, run: str, *, attempt: int, after: int, limit: int) -> dict[str, list[Any]]:
        """Columns of a run's step history. Null where a value is not finite; *_nonfinite says what it was."""
        names = ("step", "wall_seconds", "loss", "loss_nonfinite", "global_norm", "gradient_nonfinite",
                 "clip_coefficient", "learning_rate", "loss_scale")  # fmt: skip
        rows = self._db.execute(
            f"SELECT {', '.join(names)} FROM steps WHERE run=? AND attempt=? AND step>? ORDER BY step LIMIT ?",  # noqa: S608
            (run, attempt, after, limit),
        ).fetchall()
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _kind(value: float | None) -> str:
    if value is None or math.isfinite(value):
        return ""
    return "nan" if math.isnan(value) else "inf"
