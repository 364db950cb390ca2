"""What survives: SQLite in WAL mode, one writer. A commit holds the steps and the counters that they moved together.

`synchronous=NORMAL`: a killed process loses nothing that was committed. A power cut may lose the last commits, as a
whole; their records come again from the ranks' rings, if the ranks still run.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.records.steps import Step, finite, kind_of
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import WINDOW_STEPS, Attempt, Instance
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.incidents import INCIDENTS_KEPT
from foreshock_collector.state.runs import EVENTS_KEPT, Changes, Run
from foreshock_protos.v1 import telemetry_pb2 as pb

SCHEMA = 3
_APPLICATION = 0x464F5245  # "FORE"
_STEP_COLUMNS = tuple(field.name for field in fields(Step))
_INSTANCE_COLUMNS = (
    *("rank", "local_rank", "node", "pid", "layers", "position", "closed", "detail", "last_report", "last_step"),
    *("last_finished", "loss", "local_norm", "local_nonfinite", "left_seconds", "backward_passes", "dropped", "told"),
)
_SHOWN_VALUES = (
    *("sequence", "step", "wall_seconds", "duration_seconds", "learning_rate", "loss", "loss_scale", "global_norm"),
    *("clip_coefficient", "skipped"),
)
_SHOWN = ", ".join((*_SHOWN_VALUES, "nan_loss", "inf_loss", "nan_gradient", "inf_gradient"))
_TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (run TEXT PRIMARY KEY, snapshot TEXT NOT NULL);
CREATE TABLE attempts (run TEXT, attempt INTEGER, launch TEXT, started_seconds REAL, hello BLOB,
  PRIMARY KEY (run, attempt));
CREATE TABLE instances (instance TEXT PRIMARY KEY, run TEXT, attempt INTEGER, {", ".join(_INSTANCE_COLUMNS)});
CREATE TABLE steps (run TEXT, {", ".join(_STEP_COLUMNS)}, PRIMARY KEY (run, attempt, sequence)) WITHOUT ROWID;
CREATE TABLE events (id INTEGER PRIMARY KEY, run TEXT, event TEXT);
CREATE INDEX events_by_run ON events (run, id);
CREATE TABLE incidents (run TEXT, id INTEGER, incident TEXT, window BLOB, PRIMARY KEY (run, id)) WITHOUT ROWID;
CREATE TABLE rank_window (id INTEGER PRIMARY KEY, run TEXT, attempt INTEGER, last_sequence INTEGER, instance TEXT,
  batch BLOB);
CREATE INDEX rank_window_by_run ON rank_window (run, attempt, last_sequence);
"""
"""The window of `incidents` holds the records before it; `rank_window` holds batches as they came."""


class StoreError(ValueError):
    """The file is not a database that this collector can use."""


class Store:
    """The database of one collector. Raises `StoreError`."""

    def __init__(self, path: Path | str) -> None:
        self._lock = _lock(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            self._unlock()
            raise StoreError(f"database {path} cannot be used: {error}") from error
        try:
            self._open(path)
        except sqlite3.Error as error:
            self.close()
            raise StoreError(f"database {path} cannot be used: {error}") from error
        except StoreError:
            self.close()
            raise
        self.epoch: str = self._one("SELECT value FROM meta WHERE key='epoch'")
        """Identity of this database: a recorder that meets another one sends all it has."""

    def _open(self, path: Path | str) -> None:
        if not self._one("SELECT count(*) FROM sqlite_master"):
            self._db.execute("PRAGMA journal_mode=WAL")
            stamp = f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={SCHEMA};"
            self._db.executescript(f"BEGIN; {_TABLES} {stamp} COMMIT;")
            self._db.execute("INSERT INTO meta VALUES ('epoch', ?)", (uuid.uuid4().hex,))
        elif self._one("PRAGMA application_id") != _APPLICATION:
            raise StoreError(f"database {path} is not a Foreshock database; give another path")
        elif (version := self._one("PRAGMA user_version")) != SCHEMA:
            raise StoreError(f"database {path} has schema {version}, this collector knows {SCHEMA}; give another path")
        self._db.execute("PRAGMA synchronous=NORMAL")

    def commit(self, runs: Iterable[Run]) -> None:
        """Everything about these runs since their last commit, at once or not at all. Raises `sqlite3.Error`.

        Of a run whose state cannot be written, its records and steps are. The other runs notice nothing.
        """
        changed = [(run, run.changes) for run in runs if run.changes is not None]
        if not changed:
            return
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            stored = [(run, changes) for run, changes in changed if self._save(run, changes)]
        for run, changes in stored:
            run.changes = None
            for instance in changes.instances.values():
                instance.stored, instance.closed_stored = instance.position, bool(instance.closed)

    def _save(self, run: Run, changes: Changes) -> bool:
        for state_too in (True, False):
            self._db.execute("SAVEPOINT run")
            try:
                self._write_records(run, changes)
                if state_too:
                    self._write_state(run, changes)
                else:
                    # Found again after a restart, with records newer than its state: the same may then come twice.
                    bare = _json(run.bare_snapshot())
                    self._db.execute("INSERT OR IGNORE INTO runs VALUES (?,?)", (run.name, bare))
            except Exception as error:
                if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
                    raise  # of the file: all runs have it
                self._db.execute("ROLLBACK TO run")
                run.errors.add("store", error)
            else:
                return True
            finally:
                if self._db.in_transaction:
                    self._db.execute("RELEASE run")
        return False

    def _write_records(self, run: Run, changes: Changes) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO attempts VALUES (?,?,?,?,?)",
            [(run.name, a.number, a.launch, a.started_seconds, a.hello.SerializeToString()) for a in changes.attempts],
        )
        self._db.executemany(
            f"INSERT OR REPLACE INTO instances VALUES ({_marks(3 + len(_INSTANCE_COLUMNS))})",  # noqa: S608
            [(i.name, run.name, i.attempt.number, *map(_plain, _values(i))) for i in changes.instances.values()],
        )
        self._db.executemany(
            f"INSERT OR REPLACE INTO steps VALUES ({_marks(1 + len(_STEP_COLUMNS))})",  # noqa: S608
            [(run.name, *(_stored(getattr(s, name)) for name in _STEP_COLUMNS)) for s in changes.steps],
        )
        self._db.executemany(
            "INSERT INTO rank_window (run, attempt, last_sequence, instance, batch) VALUES (?,?,?,?,?)",
            [
                (run.name, i.attempt.number, b.first_sequence + len(b.step) - 1, i.name, b.SerializeToString())
                for i, b in changes.batches
            ],
        )
        for attempt in (attempt for attempt in run.attempts if not attempt.evicted):
            # What waits for its step is kept, however old.
            keep = attempt.finalized - WINDOW_STEPS if attempt is run.newest else attempt.finalized
            where = "run=? AND attempt=? AND last_sequence<=?"
            self._db.execute(f"DELETE FROM rank_window WHERE {where}", (run.name, attempt.number, keep))  # noqa: S608

    def _write_state(self, run: Run, changes: Changes) -> None:
        self._db.executemany(
            "INSERT INTO events (run, event) VALUES (?,?)", [(run.name, _json(event)) for event in changes.events]
        )
        for number, incident in changes.incidents.items():
            window = changes.windows.get(number)
            self._db.execute(
                "INSERT INTO incidents VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET incident = excluded.incident, "
                "window = coalesce(excluded.window, window)",
                (run.name, number, _json(incident), window and window.as_bytes()),
            )
        self._db.execute("INSERT OR REPLACE INTO runs VALUES (?,?)", (run.name, _json(run.snapshot())))

    def forget_window(self, run: Run) -> None:
        """The run has ended: its rank-level records go, but for those around incidents."""
        self._db.execute("DELETE FROM rank_window WHERE run=?", (run.name,))

    def load(self, now: float, rules_of: Callable[[str], Rules] = lambda _: DEFAULT) -> Runs:
        """All runs, as they were committed. One that cannot be read is set aside. Raises `StoreError`."""
        runs = Runs(rules_of)
        try:
            for name, snapshot in self._db.execute("SELECT run, snapshot FROM runs ORDER BY rowid").fetchall():
                try:
                    run = self._restored(name, json.loads(snapshot), now, rules_of)
                except Exception as error:
                    runs.errors.add("load", error, f"run {name!r}, which is set aside")
                    self._set_aside(name, snapshot)
                else:
                    runs.add(run)
        except sqlite3.Error as error:
            raise StoreError(f"the database cannot be read: {error}") from error
        return runs

    def _restored(self, name: str, snapshot: dict[str, Any], now: float, rules_of: Callable[[str], Rules]) -> Run:
        query = "SELECT hello FROM attempts WHERE run=? ORDER BY attempt"
        hellos = [pb.Hello.FromString(hello) for (hello,) in self._db.execute(query, (name,))]
        run = Run.restored(name, snapshot, hellos, rules_of(hellos[0].run))
        run.watched_since = now
        instances = {i.name: i for attempt in run.attempts for i in self._instances(run, attempt)}
        newest = "SELECT event FROM events WHERE run=? ORDER BY id DESC LIMIT ?"
        run.events.extend(json.loads(e) for (e,) in reversed(self._db.execute(newest, (name, EVENTS_KEPT)).fetchall()))
        newest = "SELECT incident FROM incidents WHERE run=? ORDER BY id DESC LIMIT ?"
        run.incidents.kept.extend(
            json.loads(i) for (i,) in reversed(self._db.execute(newest, (name, INCIDENTS_KEPT)).fetchall())
        )
        waiting = "SELECT instance, batch FROM rank_window WHERE run=? ORDER BY id"
        for instance, batch in self._db.execute(waiting, (name,)).fetchall():
            with run.errors.caught("take"):
                run.restore(instances[instance], pb.StepBatch.FromString(batch), now)
        for attempt in run.attempts:
            if not attempt.evicted:
                self._restore_steps(run, attempt)
        return run

    def _set_aside(self, name: str, snapshot: str) -> None:
        """Nothing of it is lost, and its name is free: its ranks may still run."""
        aside = f"{name} (set aside {uuid.uuid4().hex[:8]})"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for table in ("attempts", "instances", "steps", "events", "incidents", "rank_window"):
                self._db.execute(f"UPDATE {table} SET run=? WHERE run=?", (aside, name))  # noqa: S608
            self._db.execute("INSERT INTO meta VALUES (?,?)", (aside, snapshot))
            self._db.execute("DELETE FROM runs WHERE run=?", (name,))

    def _instances(self, run: Run, attempt: Attempt) -> Iterable[Instance]:
        query = f"SELECT instance, {', '.join(_INSTANCE_COLUMNS)} FROM instances WHERE run=? AND attempt=?"  # noqa: S608
        for name, *values in self._db.execute(query, (run.name, attempt.number)).fetchall():
            known = dict(zip(_INSTANCE_COLUMNS, values, strict=True))
            known |= {"dropped": json.loads(known["dropped"]), "told": json.loads(known["told"])}
            known |= {"last_finished": bool(known["last_finished"]), "loss": _loaded(known["loss"])}
            instance = Instance(name=name, attempt=attempt, **known)
            instance.stored, instance.closed_stored = instance.position, bool(instance.closed)
            attempt.instances[instance.rank] = instance
            yield instance

    def _restore_steps(self, run: Run, attempt: Attempt) -> None:
        query = f"SELECT {', '.join(_STEP_COLUMNS)} FROM steps WHERE run=? AND attempt=? ORDER BY sequence DESC LIMIT ?"  # noqa: S608
        for values in reversed(self._db.execute(query, (run.name, attempt.number, WINDOW_STEPS)).fetchall()):
            known = dict(zip(_STEP_COLUMNS, values, strict=True))
            attempt.steps.append(Step(**{name: _loaded(value) for name, value in known.items()}))

    def steps(self, run: str, *, attempt: int, after: int, limit: int) -> dict[str, list[Any]]:
        """Columns of a run's step history, from a sequence number on.

        Null where a value is not finite; then `loss_nonfinite` or `gradient_nonfinite` says "nan" or "inf".
        """
        query = f"SELECT {_SHOWN} FROM steps WHERE run=? AND attempt=? AND sequence>? ORDER BY sequence LIMIT ?"  # noqa: S608
        return _columns(self._db.execute(query, (run, attempt, after, limit)).fetchall())

    def peaks(self, run: str, *, attempt: int, first: int, last: int, bin_width: int) -> dict[str, list[Any]]:
        """The same, of each `bin_width` steps the one with the largest norm; one that is not finite is the largest."""
        # With a single max(), SQLite takes the other columns from the row that has it; a text is above all numbers.
        bad = "nan_loss OR inf_loss OR nan_gradient OR inf_gradient"
        peak = f"max(CASE WHEN {bad} THEN 'bad' ELSE global_norm END)"
        where = "run=? AND attempt=? AND sequence BETWEEN ? AND ?"
        query = f"SELECT {_SHOWN}, {peak} FROM steps WHERE {where} GROUP BY (sequence - 1) / ? ORDER BY sequence"  # noqa: S608
        return _columns(self._db.execute(query, (run, attempt, first, last, bin_width)).fetchall())

    def incident_window(self, run: str, number: int) -> Window | None:
        """The records before an incident; None if it has none."""
        found = self._db.execute("SELECT window FROM incidents WHERE run=? AND id=?", (run, number)).fetchone()
        return Window.from_bytes(found[0]) if found and found[0] else None

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _one(self, query: str) -> Any:
        return self._db.execute(query).fetchone()[0]


def _lock(path: Path | str) -> Any:
    """Held for as long as this process lives, however it ends: two collectors on one file would undo each other."""
    if str(path) == ":memory:":
        return None
    try:
        file = Path(f"{path}.lock").open("w")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"database {path} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"database {path} is in use by another collector; stop that one or give another path"
        ) from None
    return file


def _columns(rows: list[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: [finite(_loaded(row[i])) for row in rows] for i, name in enumerate(_SHOWN_VALUES)
    }
    first = len(_SHOWN_VALUES)
    columns["skipped"] = [bool(skipped) for skipped in columns["skipped"]]
    columns["loss_nonfinite"] = [_kind(row[first], row[first + 1]) for row in rows]
    columns["gradient_nonfinite"] = [_kind(row[first + 2], row[first + 3]) for row in rows]
    return columns


def _values(instance: Instance) -> list[Any]:
    return [getattr(instance, name) for name in _INSTANCE_COLUMNS]


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else _stored(value)


def _stored(value: Any) -> Any:
    # SQLite turns a NaN into NULL, and NULL means that there is no value.
    return kind_of(value) or value if isinstance(value, float) else value


def _loaded(value: Any) -> Any:
    return float(value) if value in ("nan", "inf") else value


def _kind(nan: int, inf: int) -> str:
    return "nan" if nan else "inf" if inf else ""


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _marks(count: int) -> str:
    return ",".join("?" * count)
