"""What survives: SQLite in WAL mode, one writer. A commit holds the steps and the counters that they moved together.

`synchronous=NORMAL`: a killed process loses nothing that was committed. A power cut may lose the last commits, as a
whole; their records come again from the ranks' rings, if the ranks still run.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.records.batch import MAX_SEQUENCE
from foreshock_collector.records.steps import Step, kind_of
from foreshock_collector.state.attempts import WINDOW_STEPS, Attempt
from foreshock_collector.state.database_file import DamagedError, DatabaseFile, StoreError
from foreshock_collector.state.encoding import decode, encode
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.events import EVENTS_KEPT, DetectedEvent, RankEvent, RunEvent
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.history import History, number_of
from foreshock_collector.state.incidents import INCIDENTS_KEPT, Incident
from foreshock_collector.state.instances import Instance, InstanceState
from foreshock_collector.state.restoring import restore
from foreshock_collector.state.run_state import RunState
from foreshock_collector.state.runs import Run
from foreshock_collector.state.schema import STEP_COLUMNS, is_damage, open_database
from foreshock_protos.v1 import telemetry_pb2 as pb

_EVENT_SOURCES: dict[str, type[RunEvent]] = {"detector": DetectedEvent, "rank": RankEvent}
_DELETED_STEPS = 20_000
"""Steps deleted at once: the collector does nothing else meanwhile, for some ten milliseconds."""
_DELETED_BATCHES = 1000
"""Batches deleted at once: each has up to some hundred steps of a rank."""
_ASIDE = "set aside: "
"""Begins the key in `meta` of the state of a run that cannot be decoded."""
_ARCHIVED_AT_ONCE = 100
"""Ended runs that are in memory at most, beside those that stay, while the collector starts."""
_WHOLE = {0.0: 0, 1.0: 1}
"""As integers, these take no byte instead of 8: most clip coefficients and loss scales are 1."""
_step_values = attrgetter(*STEP_COLUMNS)
"""Returns the columns of a step, measurements last."""
_SOURCE_OF = {kind: source for source, kind in _EVENT_SOURCES.items()}


class Store(History):
    """Stores the runs of one collector in a database. Raises `StoreError`."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._file = None if str(path) == ":memory:" else DatabaseFile(self._path)
        try:
            super().__init__(open_database(path))
        except StoreError:
            self._unlock()
            raise
        try:
            (epoch,) = self._db.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
        except (sqlite3.DatabaseError, TypeError) as error:
            self.close()
            raise DamagedError(f"database {path} is damaged: {error}") from error
        self.epoch: str = epoch
        """Identity of this database. A recorder that finds another one sends all records that it still has."""

    def commit(self, runs: Iterable[Run]) -> None:
        """Store everything about these runs since their last commit, in one transaction.

        If the state of a run cannot be written, its records and steps still are. Other runs are not affected. Raises
        `sqlite3.Error` or `GoneError`.
        """
        changed = [run for run in runs if run.changed]
        if not changed:
            return
        if self._file is not None:
            self._file.check()
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            stored = [run for run in changed if self._save(run)]
        for run in stored:
            run.mark_stored()

    def _save(self, run: Run) -> bool:
        for state_too in (True, False):
            self._db.execute("SAVEPOINT run")
            try:
                self._write_records(run)
                if state_too:
                    self._write_state(run)
                else:
                    # The run survives a restart, but its state is older than its records: some events may come twice.
                    self._db.execute("INSERT OR IGNORE INTO runs VALUES (?,?)", (run.name, encode(run.bare_state())))
            except Exception as error:
                if isinstance(error, sqlite3.OperationalError) or is_damage(error):
                    raise  # the whole database is affected, not one run
                self._db.execute("ROLLBACK TO run")
                run.errors.add("store", error)
            else:
                return True
            finally:
                if self._db.in_transaction:
                    self._db.execute("RELEASE run")
        return False

    def _write_records(self, run: Run) -> None:
        unsaved = run.unsaved
        self._db.executemany(
            "INSERT OR REPLACE INTO attempts VALUES (?,?,?,?,?)",
            [(run.name, a.number, a.launch, a.started_seconds, a.hello.SerializeToString()) for a in unsaved.attempts],
        )
        self._db.executemany(
            "INSERT INTO instances VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET state = excluded.state",
            [(i.name, run.name, i.attempt, encode(i)) for i in unsaved.instances.values()],
        )
        self._db.executemany(
            f"INSERT OR REPLACE INTO steps VALUES ({','.join('?' * (1 + len(STEP_COLUMNS)))})",  # noqa: S608
            [_row(run.name, step) for step in unsaved.steps],
        )
        self._db.executemany(
            "INSERT INTO rank_window (run, attempt, last_sequence, instance, batch) VALUES (?,?,?,?,?)",
            [
                (run.name, each.attempt, each.last_sequence, each.instance, each.message.SerializeToString())
                for each in unsaved.received
            ],
        )
        for attempt in (attempt for attempt in run.attempts if not attempt.evicted):
            # Records that wait for their step are kept, however old.
            done = attempt.finalized - WINDOW_STEPS if attempt is run.newest else attempt.finalized
            where = "run=? AND attempt=? AND last_sequence<=?"
            self._db.execute(f"DELETE FROM rank_window WHERE {where}", (run.name, attempt.number, done))  # noqa: S608

    def _write_state(self, run: Run) -> None:
        self._db.executemany(
            "INSERT INTO events (run, source, event) VALUES (?,?,?)",
            [(run.name, _SOURCE_OF[type(event)], encode(event)) for event in run.events.unsaved],
        )
        for number, incident in run.incidents.unsaved.items():
            window = run.incidents.unsaved_windows.get(number)
            self._db.execute(
                "INSERT INTO incidents VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET incident = excluded.incident, "
                "window = coalesce(excluded.window, window)",
                (run.name, number, encode(incident), window and window.as_bytes()),
            )
        self._db.execute(
            "INSERT INTO runs VALUES (?,?) ON CONFLICT DO UPDATE SET state = excluded.state",
            (run.name, encode(run.state())),
        )

    def forget_window(self, run: Run) -> None:
        """Delete the rank-level records of a run that has ended, except those around incidents."""
        self._db.execute("DELETE FROM rank_window WHERE run=?", (run.name,))

    def delete_steps(self, run: Run, *, keep: int) -> int:
        """Delete some thousands of a run's oldest steps, but none of the newest `keep` of an attempt.

        Return their number. Raises `sqlite3.Error`.
        """
        for attempt in run.attempts:
            where, these = "run=? AND attempt=?", (run.name, attempt.number)
            (first,) = self._db.execute(f"SELECT min(sequence) FROM steps WHERE {where}", these).fetchone()  # noqa: S608
            last = attempt.finalized - keep
            if first is not None and first <= last:
                last = min(last, first + _DELETED_STEPS - 1)
                query = f"DELETE FROM steps WHERE {where} AND sequence<=?"  # noqa: S608
                return self._db.execute(query, (*these, last)).rowcount
        return 0

    def delete_archived_steps(self, run: str) -> int:
        """Delete some thousands of the oldest steps of a run that has ended. Return their number.

        Raises `sqlite3.Error`.
        """
        query = "SELECT attempt, sequence FROM steps WHERE run=? ORDER BY attempt, sequence LIMIT 1"
        first = self._db.execute(query, (run,)).fetchone()
        if first is None:
            return 0
        attempt, sequence = first
        query = "DELETE FROM steps WHERE run=? AND attempt=? AND sequence<?"
        return self._db.execute(query, (run, attempt, sequence + _DELETED_STEPS)).rowcount

    def used_bytes(self) -> int:
        """Return the size of all pages in use: what is deleted leaves pages that are used again."""
        (pages,), (free,), (size,) = (
            self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
        )
        used: int = (pages - free) * size
        return used

    def load(
        self, now: float, rules_of: Callable[[str], Rules] = lambda _: DEFAULT, *, archive_before: float = -math.inf
    ) -> Runs:
        """Return all runs as they were committed; of those that are over, only the newest are in memory.

        archive_before: Unix time; a run that has reported since stays in memory in any case. A run that cannot be
        decoded is set aside. Raises `StoreError` or `DamagedError`.
        """
        runs = Runs(rules_of, self)
        ended: list[Run] = []
        try:
            for name in self.runs():
                run = self.restored(name, rules_of, runs.errors, now)
                if run is None:
                    continue
                run.watched_since = now
                runs.add(run)
                if run.over and run.last_report() < archive_before:
                    ended.append(run)
                    # Not only at the end: there may be far more than fit in memory.
                    if len(ended) % _ARCHIVED_AT_ONCE == 0:
                        ended = runs.archive(ended)
            runs.archive(ended)
        except sqlite3.Error as error:
            damaged = is_damage(error)
            raise (DamagedError if damaged else StoreError)(f"database {self._path} cannot be read: {error}") from error
        return runs

    def restored(self, run: str, rules_of: Callable[[str], Rules], errors: Errors, now: float = math.inf) -> Run | None:
        """Return a run as it was committed, yet no time after `now`. Raises `sqlite3.Error`.

        None if it cannot be decoded: it is counted in `errors`, and set aside.
        """
        (state,) = self._db.execute("SELECT state FROM runs WHERE run=?", (run,)).fetchone()
        try:
            return self._restored(run, state, now, rules_of)
        except sqlite3.Error:
            raise
        except Exception as error:
            errors.add("load", error, f"run {run!r}, which is set aside")
            self._set_aside(run, state)
        return None

    def run_of(self, instance: str) -> str | None:
        """Return the name of the run that an instance is part of; None if no such instance is stored."""
        found = self._db.execute("SELECT run FROM instances WHERE instance=?", (instance,)).fetchone()
        return None if found is None else str(found[0])

    def _restored(self, name: str, state: bytes, now: float, rules_of: Callable[[str], Rules]) -> Run:
        query = "SELECT hello FROM attempts WHERE run=? ORDER BY attempt"
        hellos = [pb.Hello.FromString(hello) for (hello,) in self._db.execute(query, (name,))]
        run = Run.from_state(name, decode(state, RunState), hellos, rules_of(hellos[0].run))
        instances = {instance.name: instance for instance in self._instances(run)}
        # Times ahead of the clock: it was wrong then, and has been set back since.
        run.totals.limit_times(now)
        for instance in instances.values():
            instance.last_report = min(instance.last_report, now)
        newest = "SELECT source, event FROM events WHERE run=? ORDER BY id DESC LIMIT ?"
        events = self._db.execute(newest, (name, EVENTS_KEPT)).fetchall()
        run.events.restore(decode(event, _EVENT_SOURCES[source]) for source, event in reversed(events))
        newest = "SELECT incident FROM incidents WHERE run=? ORDER BY id DESC LIMIT ?"
        incidents = self._db.execute(newest, (name, INCIDENTS_KEPT)).fetchall()
        run.incidents.restore(decode(incident, Incident) for (incident,) in reversed(incidents))
        for (number,) in self._db.execute("SELECT DISTINCT attempt FROM rank_window WHERE run=?", (name,)).fetchall():
            if number < len(run.attempts):
                _ = run.attempts[number].buffer  # which shows that its steps are needed
                self._restore_records(run, number, instances, now, finalized=False)
                older = partial(self._restore_records, run, number, instances, now, finalized=True)
                run.evidence.append(older)
        for attempt in run.attempts:
            if not attempt.evicted:
                run.evidence.append(partial(self._restore_steps, run, attempt))
        run.departures_pending = any(attempt.departures_pending for attempt in run.attempts)
        return run

    def _restore_records(
        self, run: Run, attempt: int, instances: dict[str, Instance], now: float, *, finalized: bool
    ) -> None:
        """Restore records of finalized steps, which are many, or those that wait. Raises `sqlite3.Error`."""
        last = run.attempts[attempt].finalized
        # Of a job of many ranks, fewer finalized steps fit into memory than are stored.
        between = (max(0, last - run.attempts[attempt].buffer.capacity), last) if finalized else (last, MAX_SEQUENCE)
        query = (
            "SELECT instance, batch FROM rank_window WHERE run=? AND attempt=? AND last_sequence>? AND last_sequence<=?"
        )
        for instance, batch in self._db.execute(query, (run.name, attempt, *between)):
            with run.errors.caught("ingest"):
                restore(run, instances, instance, batch, now)

    def _set_aside(self, name: str, state: bytes) -> None:
        """Take a run out of the list of runs. Its rows stay under its name, which no other run gets meanwhile.

        Nothing large is moved: that would take seconds for a gigabyte, in which nobody is served. Its instances are
        renamed, for its ranks may still be live, and then begin a run of another name.
        """
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            suffix = f" of {name}, set aside"
            self._db.execute("UPDATE instances SET instance = instance || ? WHERE run=?", (suffix, name))
            self._db.execute("INSERT INTO meta VALUES (?,?)", (_ASIDE + name, state))
            self._db.execute("DELETE FROM runs WHERE run=?", (name,))

    def is_set_aside(self, run: str) -> bool:
        """Return whether a run of this name could not be decoded, and is still stored. Raises `sqlite3.Error`."""
        return self._db.execute("SELECT 1 FROM meta WHERE key=?", (_ASIDE + run,)).fetchone() is not None

    def delete_set_aside(self) -> int:
        """Delete some thousands of the rows of a run that was set aside. Return their number.

        Raises `sqlite3.Error`.
        """
        query = "SELECT substr(key, ?) FROM meta WHERE substr(key, 1, ?)=? LIMIT 1"
        found = self._db.execute(query, (len(_ASIDE) + 1, len(_ASIDE), _ASIDE)).fetchone()
        if found is None:
            return 0
        if deleted := self.delete_archived_steps(*found):
            return deleted
        query = "DELETE FROM rank_window WHERE id IN (SELECT id FROM rank_window WHERE run=? LIMIT ?)"
        if deleted := self._db.execute(query, (*found, _DELETED_BATCHES)).rowcount:
            return deleted
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for table in ("attempts", "instances", "events", "incidents"):
                self._db.execute(f"DELETE FROM {table} WHERE run=?", found)  # noqa: S608
            return self._db.execute("DELETE FROM meta WHERE key=?", (_ASIDE + found[0],)).rowcount

    def _instances(self, run: Run) -> Iterator[Instance]:
        query = "SELECT state FROM instances WHERE run=? ORDER BY attempt, rowid"
        for (state,) in self._db.execute(query, (run.name,)).fetchall():
            instance = Instance(decode(state, InstanceState))
            instance.mark_stored()
            run.attempts[instance.attempt].instances[instance.rank] = instance
            yield instance

    def _restore_steps(self, run: Run, attempt: Attempt) -> None:
        columns = ", ".join(STEP_COLUMNS)
        query = f"SELECT {columns} FROM steps WHERE run=? AND attempt=? ORDER BY sequence DESC LIMIT ?"  # noqa: S608
        for values in reversed(self._db.execute(query, (run.name, attempt.number, WINDOW_STEPS)).fetchall()):
            known = dict(zip(STEP_COLUMNS, map(number_of, values), strict=True))
            measurements = decode(known["measurements"], dict[str, float]) if known["measurements"] else {}
            attempt.steps.append(Step(**known | {"measurements": measurements}))

    def size_bytes(self) -> int:
        """Return what the database and its write-ahead log take on disk; 0 in memory."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.is_file())

    def close(self) -> None:
        """Close the database and release its lock."""
        super().close()
        self._unlock()

    def _unlock(self) -> None:
        if self._file is not None:
            self._file.close()


def _row(run: str, step: Step) -> list[Any]:
    *values, measurements = _step_values(step)
    # SQLite turns a NaN into NULL, and NULL means that there is no value.
    row = [
        kind_of(value) if isinstance(value, float) and not isfinite(value) else _WHOLE.get(value, value)
        for value in values
    ]
    # Most steps have no measurements beside their own columns.
    return [run, *row, encode(measurements) if measurements else None]
