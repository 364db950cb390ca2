"""Start with a damaged database: it is set aside, and what can be read of it is copied to a new one."""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.database_file import DamagedError, is_collectors, set_aside
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.migrations import SCHEMA
from foreshock_collector.state.schema import TABLES, open_database
from foreshock_collector.state.store import Store

logger = logging.getLogger(__name__)


def load(
    path: str, now: float, rules_of: Callable[[str], Rules] = lambda _: DEFAULT, *, archive_before: float = -math.inf
) -> tuple[Store, Runs]:
    """Open a database and load its runs, after `replace` if it is damaged.

    Raises `StoreError`, also for a file that may not be a collector's at all: it stays where it is. now: Unix time.
    archive_before: as of `Store.load`.
    """
    try:
        return _load(path, now, rules_of, archive_before)
    except DamagedError as error:
        if not is_collectors(Path(path)):
            raise
        replace(Path(path), error)
    return _load(path, now, rules_of, archive_before)


def _load(path: str, now: float, rules_of: Callable[[str], Rules], archive_before: float) -> tuple[Store, Runs]:
    store = Store(path)
    try:
        return store, store.load(now, rules_of, archive_before=archive_before)
    except BaseException:
        store.close()
        raise


def replace(path: Path, error: Exception) -> None:
    """Set a collector's damaged database aside, and put a new one in its place with all rows that can still be read.

    Nobody may use it. error: how it was found. Raises `StoreError` if no new one can be made.
    """
    aside = set_aside(path)
    copied = dict.fromkeys(TABLES, 0)
    target = open_database(path)
    try:
        source = sqlite3.connect(f"{aside.absolute().as_uri()}?mode=ro", isolation_level=None, uri=True)
        try:
            copied = salvage(source, target)
        finally:
            source.close()
    finally:
        target.close()
    facts = {"database": str(path), "error": str(error), "aside": str(aside)} | copied
    text = (
        "%(error)s; it was set aside as %(aside)s, and a new one has what could be read: %(runs)d runs, "
        "%(steps)d steps, %(incidents)d incidents"
    )
    logger.error(text, facts)


def salvage(source: sqlite3.Connection, target: sqlite3.Connection) -> dict[str, int]:
    """Copy the rows that can be read to an empty database of the newest schema. Return their number by table.

    A damaged page ends a scan, so each table is read from both ends.
    """
    copied = dict.fromkeys(TABLES, 0)
    try:
        # Otherwise SQLite reads nothing at all of a file that was cut.
        source.execute("PRAGMA writable_schema=ON")
        if source.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
            return copied
    except sqlite3.DatabaseError:
        return copied
    for table, key in TABLES.items():
        for order in ("ASC", "DESC"):
            by = ", ".join(f"{column} {order}" for column in key)
            before = target.total_changes
            target.execute("BEGIN")
            whole = _copy(source, target, table, by)
            target.execute("COMMIT")
            copied[table] += target.total_changes - before
            if whole:
                break
    return copied


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, table: str, by: str) -> bool:
    """Copy rows in an order, up to the first that cannot be read. Return whether there was none."""
    names = [name for _, name, *_ in target.execute(f"PRAGMA table_info({table})")]
    # The identity of the new database is its own: recorders then send again what they have.
    insert = f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(names))})"  # noqa: S608
    rows = source.cursor()
    try:
        # Fails where the damage is in the table's definition.
        rows.execute(f"SELECT {', '.join(names)} FROM {table} ORDER BY {by}")  # noqa: S608
    except sqlite3.DatabaseError:
        return False
    while True:
        try:
            row = rows.fetchone()
        except sqlite3.DatabaseError:
            return False
        if row is None:
            return True
        target.execute(insert, row)
