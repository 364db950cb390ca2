"""An upgrade of the database keeps all that it held; one that fails leaves it as it was."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from foreshock_collector.commands.logs import read_log
from foreshock_collector.state import migrations
from foreshock_collector.state.database_file import StoreError
from foreshock_collector.state.history import History
from foreshock_collector.state.store import Store
from foreshock_collector.web.api import Api
from foreshock_collector.web.exposition import RunSeries

SCHEMA_3 = Path(__file__).with_name("schema_3.sql")
"""Dumped by a collector of schema 3: one run has ended and is evicted, one exploded, died and goes on with a fault in
its second attempt, one withholds a failure, one waits for a rank with a NaN as its newest loss, one fell silent."""
RUNS = ["done", "guarded", "silent", "again", "waiting"]
ANSWERS_3 = Path(__file__).with_name("schema_3.json")
"""What the same collector answered of it after a restart; the usual bands are those of the rule as it is now."""
ADDED = {"title", "verdict_title", "names_last_step"}
"""Keys that answers have gained since: those of a verdict follow from its cause."""
ADDED_COLUMNS = {"update_ratio", "parameter_norm", "first_moment_norm", "second_moment_norm"}
"""Columns that answers about steps have gained since."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with closing(sqlite3.connect(tmp_path / "db")) as database:
        database.executescript(SCHEMA_3.read_text())
    return tmp_path / "db"


def contents(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        return [f"schema {version}", *database.iterdump()]


def without_added(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key not in ADDED}


def answers(store: Store, now: float) -> dict[str, Any]:
    """All that the API and /metrics show, in the shape of `ANSWERS_3`."""
    runs = store.load(now)
    for run in runs:
        for load in run.evidence:
            load()
    api = Api(runs=runs, store=store, clock=lambda: now, silent=900.0)
    handlers = {route.path: route.handler for route in api.routes() if isinstance(route, web.RouteDef)}
    a_run = "/api/v1/runs/{run:[^/]+}"

    def ask(handler: str, query: dict[str, str] | None = None, **match: str) -> Any:
        request: Any = SimpleNamespace(query=query or {}, match_info=match)
        answer: Any = handlers[handler](request)
        # Handlers wait for nothing but their turn.
        while True:
            try:
                answer.send(None)
            except StopIteration as end:
                return json.loads(end.value.text, object_pairs_hook=without_added)

    found: dict[str, Any] = {"now": now, "runs": ask("/api/v1/runs", {"recent": "1"})}
    for run in runs:
        of_run = found[run.name] = {"run": ask(a_run, run=run.name)}
        for attempt in map(str, range(len(run.attempts))):
            for what, query in (("steps", {}), ("series", {"points": "10"})):
                columns = ask(f"{a_run}/{what}", {"attempt": attempt, **query}, run=run.name)
                assert columns.keys() >= ADDED_COLUMNS
                of_run[f"{what} {attempt}"] = {name: columns[name] for name in columns.keys() - ADDED_COLUMNS}
            for by in ("ranks", "layers"):
                query = {"attempt": attempt, "columns": "9"}
                of_run[f"heat {attempt} {by}"] = ask(
                    f"{a_run}/heat/{{by:ranks|layers|updates}}", query, run=run.name, by=by
                )
        for incident in run.incidents.kept:
            number = str(incident.number)
            of_incident = ask(f"{a_run}/incidents/{{id}}", run=run.name, id=number)
            of_incident["records"] = of_incident["records"][-2:]
            of_run[f"incident {number}"] = of_incident
    registry = CollectorRegistry()
    registry.register(RunSeries(runs, lambda: now, ended_seconds=900.0, silent=900.0))
    lines = generate_latest(registry).decode().splitlines()
    found["metrics"] = [line for line in lines if line[0] != "#" and not line.endswith(" 0.0")]
    return found


def test_an_upgraded_database_answers_as_it_did_before(path: Path) -> None:
    before = json.loads(ANSWERS_3.read_text())
    with closing(Store(path)) as store:
        after = answers(store, before["now"])
        assert after.keys() == before.keys()
        for name, answer in before.items():
            assert after[name] == answer, name
        assert store.epoch in SCHEMA_3.read_text()


def test_what_an_upgraded_run_was_about_to_find_it_still_finds(path: Path) -> None:
    now = json.loads(ANSWERS_3.read_text())["now"]
    with closing(Store(path)) as store:
        _, guarded, _, again, waiting = store.load(now)
    withheld = guarded.newest.detector.withheld
    assert withheld is not None
    assert (withheld.event.sequence, withheld.failure.sequence, withheld.failure.finite_before) == (11, 11, True)
    first, second = again.attempts
    assert first.failure is not None and first.failure.climbing == first.failure.sequence - 1
    assert second.failure is None and second.faults.streaks["duplicate_data"].on
    assert (waiting.newest.finalized, waiting.newest.buffer.highest) == (33, 35)


def test_internal_errors_that_were_counted_before_an_upgrade_still_are(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            """UPDATE runs SET snapshot=replace(snapshot, '"take": 0, "judge": 0', '"take": 2, "judge": 3')"""
        )
    with closing(Store(path)) as store:
        for run in store.load(0.0):
            assert run.errors.nonzero() == {"ingest": 2, "evaluate": 3}


def test_an_upgraded_database_has_the_layout_of_a_new_one(path: Path, tmp_path: Path) -> None:
    def layout(path: Path) -> list[Any]:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        return [(*names, " ".join(sql.split()) if sql else None) for *names, sql in found]

    Store(path).close()
    Store(tmp_path / "new").close()
    assert layout(path) == layout(tmp_path / "new")


def test_the_instances_of_a_run_are_found_without_looking_at_all(path: Path) -> None:
    with closing(Store(path)) as store:
        plan = store._db.execute(
            "EXPLAIN QUERY PLAN SELECT state FROM instances WHERE run=? ORDER BY attempt, rowid", "r"
        )
        assert [detail for *_, detail in plan] == ["SEARCH instances USING INDEX instances_by_run (run=?)"]


def test_an_upgrade_keeps_a_backup_and_says_where(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(path)
    with caplog.at_level("INFO", "foreshock_collector.state.schema"):
        Store(path).close()
        Store(path).close()
    (record,) = caplog.records
    backup = f"{path}.schema-3"
    assert record.getMessage() == (
        f"upgraded database {path} from schema 3 to {migrations.SCHEMA}; {backup} is a copy of the old one"
    )
    assert record.args == {"database": str(path), "from": 3, "to": migrations.SCHEMA, "backup": backup}
    caplog.clear()
    assert contents(tmp_path / "db.schema-3") == before
    assert contents(path) != before


@pytest.mark.parametrize("fails", ["the step", "the end", "the backup"])
def test_an_upgrade_that_fails_leaves_the_database_as_it_was(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    before = contents(path)

    def broken(database: sqlite3.Connection) -> None:
        if fails == "the end":
            migrations._json_to_messagepack(database)
        database.execute("DELETE FROM steps")
        raise ZeroDivisionError("no such luck")

    with monkeypatch.context() as patch:
        if fails == "the backup":
            (tmp_path / "db.schema-3").mkdir()
            says = "its backup .*db.schema-3, which an upgrade needs, cannot be written"
        else:
            patch.setattr(migrations, "_STEPS", (broken,))
            says = r"db cannot be used: upgrading it from schema 3 to \d failed: no such luck"
        with pytest.raises(StoreError, match=says):
            Store(path)
    assert contents(path) == before
    assert not list(tmp_path.glob("*.draft"))
    if fails != "the backup":
        assert contents(tmp_path / "db.schema-3") == before
        with closing(Store(path)) as store:
            assert store.runs() == RUNS


def test_a_run_that_could_not_be_read_before_is_set_aside_and_costs_no_other(
    path: Path, errors_expected: None, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE runs SET snapshot='{\"experiment\": ' WHERE run='done'")
        database.execute("UPDATE events SET event='[]' WHERE run='waiting'")
    with closing(Store(path)) as store:
        runs = store.load(0.0)
    assert [run.name for run in runs] == ["guarded", "silent", "again"]
    assert runs.errors.nonzero() == {"load": 2}


@pytest.mark.integration
def test_an_upgrade_that_is_killed_leaves_the_database_as_it_was(path: Path) -> None:
    before = contents(path)
    killed = """
import os, signal, sys
from foreshock_collector.state import migrations, store

def step(database):
    migrations._json_to_messagepack(database)
    os.kill(os.getpid(), signal.SIGKILL)

migrations._STEPS = (step,)
store.Store(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", killed, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert contents(path) == before
    with closing(Store(path)) as store:
        assert store.runs() == RUNS


@pytest.fixture
def errors_expected() -> None:
    """Here a swallowed error is what the test is about."""


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (migrations.SCHEMA + 1, f"was written by a newer Foreshock; this one knows schema {migrations.SCHEMA}"),
        (2, "has schema 2, which is too old to be upgraded; give another path"),
    ],
)
def test_a_database_that_cannot_be_upgraded_is_refused_in_one_sentence(path: Path, schema: int, says: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version={schema}")
    before = contents(path)
    for opened in (Store, History.open):
        with pytest.raises(StoreError, match=says):
            opened(path)
    assert contents(path) == before


def test_a_log_is_read_from_an_old_database_without_changing_it(path: Path, tmp_path: Path) -> None:
    before, files = contents(path), sorted(tmp_path.iterdir())
    old = read_log(path, run="waiting")
    assert sorted(tmp_path.iterdir()) == files
    assert contents(path) == before
    Store(path).close()
    new = read_log(path, run="waiting")
    assert len(new) == 33
    assert str(old) == str(new)
