"""The layout of the database, and how a file is opened: created, upgraded, or refused."""

from __future__ import annotations

import logging
import sqlite3
import uuid
from pathlib import Path

from foreshock_collector.records.steps import Step
from foreshock_collector.state.database_file import APPLICATION, DamagedError, GoneError, StoreError
from foreshock_collector.state.migrations import OLDEST, SCHEMA, MigrationError, back_up, migrate

logger = logging.getLogger(__name__)

STEP_COLUMNS = Step.__struct_fields__
_TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (run TEXT PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE attempts (run TEXT, attempt INTEGER, launch TEXT, started_seconds REAL, hello BLOB,
  PRIMARY KEY (run, attempt));
CREATE TABLE instances (instance TEXT PRIMARY KEY, run TEXT, attempt INTEGER, state BLOB);
CREATE INDEX instances_by_run ON instances (run, attempt);
CREATE TABLE steps (run TEXT, {", ".join(STEP_COLUMNS)}, PRIMARY KEY (run, attempt, sequence)) WITHOUT ROWID;
CREATE TABLE events (id INTEGER PRIMARY KEY, run TEXT, source TEXT, event BLOB);
CREATE INDEX events_by_run ON events (run, id);
CREATE TABLE incidents (run TEXT, id INTEGER, incident BLOB, window BLOB, PRIMARY KEY (run, id)) WITHOUT ROWID;
CREATE TABLE rank_window (id INTEGER PRIMARY KEY, run TEXT, attempt INTEGER, last_sequence INTEGER, instance TEXT,
  batch BLOB);
CREATE INDEX rank_window_by_run ON rank_window (run, attempt, last_sequence);
"""
"""The window of `incidents` holds the records before it; `rank_window` holds batches and blocks as they came,
a block without an instance.

A change here needs a migration, and a column of `steps` is a field of `Step`.
"""
TABLES = {
    "meta": ("key",),
    "runs": ("rowid",),
    "attempts": ("rowid",),
    "instances": ("rowid",),
    "steps": ("run", "attempt", "sequence"),
    "events": ("id",),
    "incidents": ("run", "id"),
    "rank_window": ("id",),
}
"""Each table, and the columns by which it is ordered on disk."""
_PAGE_BYTES = 16384
"""Of a new database. A message of a node's ranks has about as many bytes, and a commit takes a quarter less time than
with SQLite's 4,096."""
_BUSY_SECONDS = 0.25
"""How long the collector, which serves others meanwhile, waits for a process that holds the database."""


def is_damage(error: Exception) -> bool:
    """Return whether an error of SQLite says that the file is damaged: not that it is locked, full or unwritable."""
    return type(error) is sqlite3.DatabaseError


def is_of_file(error: Exception) -> bool:
    """Return whether an error is one of the file or its disk, such as a full one: it needs no traceback."""
    return is_damage(error) or isinstance(error, (GoneError, sqlite3.OperationalError, OSError))


def open_database(path: Path | str) -> sqlite3.Connection:
    """Open a database for writing: create a new one, upgrade an older one. Raises `StoreError` or `DamagedError`."""
    try:
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"database {path} cannot be used: {error}") from error
    try:
        if not _one(database, "SELECT count(*) FROM sqlite_master"):
            database.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            database.execute("PRAGMA journal_mode=WAL")
            _create(database)
        elif (schema := _schema(database, path)) < SCHEMA:
            # A failure leaves the file unchanged.
            backup = back_up(database, path, schema)
            migrate(database, schema)
            facts = {"database": str(path), "from": schema, "to": SCHEMA, "backup": str(backup)}
            text = "upgraded database %(database)s from schema %(from)d to %(to)d; %(backup)s is a copy of the old one"
            logger.info(text, facts)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(f"PRAGMA busy_timeout={1000 * _BUSY_SECONDS:.0f}")
    except (sqlite3.Error, MigrationError) as error:
        database.close()
        raise (DamagedError if is_damage(error) else StoreError)(f"database {path} cannot be used: {error}") from error
    except StoreError:
        database.close()
        raise
    return database


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a database for reading; if it is older, upgrade a temporary copy and open that. Raises `StoreError`."""
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", isolation_level=None, uri=True)
    except sqlite3.Error as error:
        raise StoreError(f"database {path} cannot be read: {error}") from error
    try:
        if (schema := _schema(database, path)) == SCHEMA:
            return database
        # Without a name it is a file that SQLite deletes when it is closed.
        copy = sqlite3.connect("", isolation_level=None)
        try:
            database.backup(copy)
            migrate(copy, schema)
        except BaseException:
            copy.close()
            raise
        database.close()
        return copy
    except (sqlite3.Error, MigrationError) as error:
        database.close()
        raise StoreError(f"database {path} cannot be read: {error}") from error
    except StoreError:
        database.close()
        raise


def _create(database: sqlite3.Connection) -> None:
    stamp = f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={SCHEMA};"
    epoch = f"INSERT INTO meta VALUES ('epoch', '{uuid.uuid4().hex}');"  # noqa: S608
    database.executescript(f"BEGIN; {_TABLES} {epoch} {stamp} COMMIT;")


def _schema(database: sqlite3.Connection, path: Path | str) -> int:
    """Return its version. Raises `StoreError` if it is older than can be upgraded, or newer than is known."""
    if _one(database, "PRAGMA application_id") != APPLICATION:
        raise StoreError(f"database {path} is not a Foreshock database; give another path")
    schema = _one(database, "PRAGMA user_version")
    if schema > SCHEMA:
        raise StoreError(
            f"database {path} has schema {schema} and was written by a newer Foreshock; this one knows schema "
            f"{SCHEMA}: upgrade Foreshock, or give another path"
        )
    if schema < OLDEST:
        raise StoreError(f"database {path} has schema {schema}, which is too old to be upgraded; give another path")
    return schema


def _one(database: sqlite3.Connection, query: str) -> int:
    found: int = database.execute(query).fetchone()[0]
    return found
