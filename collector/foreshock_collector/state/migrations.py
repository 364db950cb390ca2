"""Upgrades of the database, from each schema to the next: in one transaction, after a backup copy.

A step spells out the layouts that it converts, and uses none of the collector's classes, because those will change.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec


class MigrationError(ValueError):
    """The database cannot be upgraded; the text says why."""


def back_up(database: sqlite3.Connection, path: Path | str, schema: int) -> Path:
    """Copy a database beside itself; the path of the copy. Raises `MigrationError`."""
    target, draft = Path(f"{path}.schema-{schema}"), Path(f"{path}.schema-{schema}.draft")
    try:
        draft.unlink(missing_ok=True)
        copy = sqlite3.connect(draft)
        try:
            database.backup(copy)
        finally:
            copy.close()
        draft.replace(target)
    except (OSError, sqlite3.Error) as error:
        draft.unlink(missing_ok=True)
        raise MigrationError(f"its backup {target}, which an upgrade needs, cannot be written: {error}") from error
    return target


def migrate(database: sqlite3.Connection, schema: int) -> None:
    """Upgrade a database from this schema to the newest, or leave it as it is. Raises `MigrationError`."""
    database.execute("BEGIN IMMEDIATE")
    try:
        for step in _STEPS[schema - OLDEST :]:
            step(database)
        database.execute(f"PRAGMA user_version={SCHEMA}")
        database.execute("COMMIT")
    except Exception as error:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise MigrationError(f"upgrading it from schema {schema} to {SCHEMA} failed: {error}") from error


# -- 3 to 4: state as MessagePack, was JSON ------------------------------------------------------------------------

_NORM_BUCKETS = tuple(10.0**e for e in range(-6, 9))
_DURATION_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_INSTANCE_COLUMNS = (
    *("rank", "local_rank", "node", "pid", "layers", "position", "closed", "detail", "last_report", "last_step"),
    *("last_finished", "loss", "local_norm", "local_nonfinite", "left_seconds", "backward_passes", "dropped", "told"),
)


def _json_to_messagepack(database: sqlite3.Connection) -> None:
    for table in ("runs", "instances", "events", "incidents"):
        database.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    database.execute("DROP INDEX events_by_run")
    database.execute("CREATE TABLE runs (run TEXT PRIMARY KEY, state BLOB NOT NULL)")
    database.execute("CREATE TABLE instances (instance TEXT PRIMARY KEY, run TEXT, attempt INTEGER, state BLOB)")
    database.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, run TEXT, source TEXT, event BLOB)")
    database.execute("CREATE INDEX events_by_run ON events (run, id)")
    database.execute(
        "CREATE TABLE incidents (run TEXT, id INTEGER, incident BLOB, window BLOB, PRIMARY KEY (run, id)) WITHOUT ROWID"
    )
    database.executemany(
        "INSERT INTO runs VALUES (?,?)",
        (
            (run, _converted(_run, snapshot))
            for run, snapshot in database.execute("SELECT run, snapshot FROM old_runs ORDER BY rowid")
        ),
    )
    database.executemany(
        "INSERT INTO instances VALUES (?,?,?,?)",
        (
            (name, run, attempt, msgspec.msgpack.encode(_instance(name, attempt, values)))
            for name, run, attempt, *values in database.execute(
                f"SELECT instance, run, attempt, {', '.join(_INSTANCE_COLUMNS)} FROM old_instances ORDER BY rowid"  # noqa: S608
            )
        ),
    )
    database.executemany(
        "INSERT INTO events VALUES (?,?,?,?)",
        (
            (number, run, "detector" if has_score else "rank", _converted(_event, event))
            for number, run, event, has_score in database.execute(
                "SELECT id, run, event, json_valid(event) AND json_type(event, '$.score') IS NOT NULL "
                "FROM old_events ORDER BY id"
            )
        ),
    )
    database.executemany(
        "INSERT INTO incidents VALUES (?,?,?,?)",
        (
            (run, number, _converted(_incident, incident), window)
            for run, number, incident, window in database.execute("SELECT run, id, incident, window FROM old_incidents")
        ),
    )
    for table in ("runs", "instances", "events", "incidents"):
        database.execute(f"DROP TABLE old_{table}")


def _converted(convert: Callable[[dict[str, Any]], dict[str, Any]], text: str) -> bytes:
    """Return JSON as MessagePack. Anything else stays as it is, and its run is set aside when it is loaded."""
    try:
        return msgspec.msgpack.encode(convert(json.loads(text)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return text.encode()


def _run(old: dict[str, Any]) -> dict[str, Any]:
    totals = old["totals"]
    norms, durations = totals.pop("norms"), totals.pop("durations")
    totals |= {
        "norms": {"bounds": _NORM_BUCKETS, "counts": norms[0], "total": norms[1]},
        "durations": {"bounds": _DURATION_BUCKETS, "counts": durations[0], "total": durations[1]},
        "recent_durations": totals.pop("recent"),
        "gauges": totals.pop("levels"),
    }
    errors = {{"take": "ingest", "judge": "evaluate"}.get(stage, stage): n for stage, n in old["errors"].items()}
    return old | {"attempts": [_attempt(attempt) for attempt in old["attempts"]], "errors": errors}


def _attempt(old: dict[str, Any]) -> dict[str, Any]:
    detector, faults = old["detector"], old["faults"]
    detector["skips_in_a_row"] = detector.pop("left_out")
    if (withheld := detector["withheld"]) is not None:
        event = withheld["event"]
        detector["withheld"] = {"event": event, "failure": {"sequence": event["sequence"], **withheld["before"]}}
    # JSON has no NaN and no infinity: they were texts.
    faults["loss_trend"] = {
        name: float(value) if isinstance(value, str) else value for name, value in faults.pop("course").items()
    }
    renamed = {"departures_checked": old.pop("departures_judged"), "finalized": old.pop("settled")}
    return old | renamed | {"failure": old["failure"] or None}


def _instance(name: str, attempt: int, values: list[Any]) -> dict[str, Any]:
    known = dict(zip(_INSTANCE_COLUMNS, values, strict=True))
    known |= {"name": name, "attempt": attempt, "last_finished": bool(known["last_finished"])}
    known |= {"dropped": json.loads(known["dropped"]), "reported_events": json.loads(known.pop("told"))}
    # SQLite turns a NaN into NULL: it was a text.
    return known | {"loss": float(known["loss"]) if isinstance(known["loss"], str) else known["loss"]}


def _event(old: dict[str, Any]) -> dict[str, Any]:
    if "score" not in old:
        return old
    seen = old.pop("seen_seconds")
    return {"event": old, "seen_seconds": seen}


def _incident(old: dict[str, Any]) -> dict[str, Any]:
    verdict = old.pop("verdict")
    verdict["try_"] = verdict.pop("try")
    return {"number": old.pop("id"), **old, "verdict": verdict}


# -- 4 to 5: what is measured on some steps in one column, had a column each ---------------------------------------

_MEASUREMENTS = ("gradient_absolute_maximum", "parameter_norm", "update_ratio")
_STEP_COLUMNS = (
    *("run", "attempt", "sequence", "step", "wall_seconds", "duration_seconds", "learning_rate", "loss", "loss_scale"),
    *("global_norm", "clip_coefficient", "skipped", "nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "ranks"),
    *("stepped", "shadow_clipped", "shadow_skipped"),
)


def _columns_to_measurements(database: sqlite3.Connection) -> None:
    database.execute("ALTER TABLE steps RENAME TO old_steps")
    columns = ", ".join(_STEP_COLUMNS)
    definition = columns.replace("run", "run TEXT", 1)
    database.execute(
        f"CREATE TABLE steps ({definition}, measurements, PRIMARY KEY (run, attempt, sequence)) WITHOUT ROWID"
    )
    database.create_function("measurements", len(_MEASUREMENTS), _measurements, deterministic=True)
    values = f"{columns}, measurements({', '.join(_MEASUREMENTS)})"
    database.execute(f"INSERT INTO steps SELECT {values} FROM old_steps")  # noqa: S608
    database.execute("DROP TABLE old_steps")


def _measurements(*values: float | str | None) -> bytes | None:
    # A NaN was a text: SQLite turns it into NULL.
    known = {name: float(value) for name, value in zip(_MEASUREMENTS, values, strict=True) if value is not None}
    return msgspec.msgpack.encode(known) if known else None


# -- 5 to 6: the instances of one run are found without looking at all -----------------------------------------------


def _index_of_instances(database: sqlite3.Connection) -> None:
    database.execute("CREATE INDEX instances_by_run ON instances (run, attempt)")


_STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _json_to_messagepack,
    _columns_to_measurements,
    _index_of_instances,
)
"""Each leads from the schema of its place, counted from `OLDEST`, to the next."""
OLDEST = 3
SCHEMA = OLDEST + len(_STEPS)
"""Version of the layout, as in the database's `user_version`."""
