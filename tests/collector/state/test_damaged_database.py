"""A database that is damaged, gone, locked or shared: the collector goes on, and keeps what can be kept."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.server import serve
from foreshock_collector.state import recovery
from foreshock_collector.state.database_file import StoreError
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.schema import open_database
from foreshock_collector.state.store import Store
from tests.support.clock import Clock
from tests.support.streams import Stream, config, hello, serving, steps
from tests.support.waiting import free_port

RUNS = ("first", "second", "third")
STEPS = 600


@pytest.fixture
def errors_expected() -> None:
    """Here they are what the tests are about."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Database of three runs."""
    path, clock, session = tmp_path_factory.mktemp("whole") / "db", Clock(), Session()
    store = Store(path)
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    for run in RUNS:
        intake.apply(hello(run, launch_id=run), session)
        for first in range(1, STEPS, 300):
            intake.apply(steps(first, [1.0] * 300, run=run), session)
        intake.commit()
    store.close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> Path:
    """That database, which no collector uses."""
    path = tmp_path / "db"
    path.write_bytes(whole)
    return path


def pages_of(path: Path, table: str) -> tuple[int, int]:
    """Size of a page, and the number of a table's first page."""
    with closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        (root,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (table,)).fetchone()
    return size, root


def overwrite_page(path: Path, table: str) -> None:
    size, root = pages_of(path, table)
    with path.open("r+b") as file:
        file.seek(size * (root - 1) + (100 if root == 1 else 0))
        file.write(os.urandom(size - 100))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 8192 * 4096)


def names(runs: Runs) -> list[str]:
    return [run.name for run in runs]


@pytest.mark.parametrize(
    ("table", "kept"),
    [("instances", RUNS), ("runs", ())],
)
def test_a_damaged_page_costs_its_table_and_the_collector_starts(
    path: Path, table: str, kept: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    overwrite_page(path, table)
    store, runs = recovery.load(str(path), 0.0)
    assert names(runs) == list(kept)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    aside = path.with_name("db.damaged-1")
    assert f"it was set aside as {aside}, and a new one has what could be read: {len(kept)} runs, " in line
    assert aside.exists()
    assert len(store.steps("first", attempt=0, after=0, limit=1000)["step"]) == STEPS
    store.close()
    again, _ = recovery.load(str(path), 0.0)
    again.close()
    assert not path.with_name("db.damaged-2").exists()


@pytest.mark.parametrize("table", ["rank_window", "steps"])
def test_damage_among_the_steps_before_a_restart_is_found_once_they_are_loaded(
    path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    overwrite_page(path, table)
    clock = Clock()
    store, runs = recovery.load(str(path), clock())
    intake = Intake(runs, store, clock, ended_seconds=900.0, silent=900.0)
    intake.commit()
    error = intake.database_error
    assert isinstance(error, sqlite3.DatabaseError)
    store.close()
    recovery.replace(path, error)
    assert "it was set aside as" in caplog.records[-1].getMessage()
    store, runs = recovery.load(str(path), clock())
    assert names(runs) == list(RUNS)
    kept = len(store.steps("first", attempt=0, after=0, limit=1000)["step"])
    assert (kept == STEPS) == (table != "steps")
    first = runs.get("first")
    assert first is not None
    # A recorder continues where it was: nothing counts twice.
    assert (first.totals.counters["steps"], first.attempts[0].instances[0].position) == (STEPS, STEPS)
    store.close()


def test_a_damaged_definition_costs_its_table_and_the_collector_starts(path: Path) -> None:
    data = path.read_bytes()
    definition = b"CREATE TABLE rank_window ("
    assert data.count(definition) == 1
    path.write_bytes(data.replace(definition, definition[:-1] + b"\0"))
    store, runs = recovery.load(str(path), 0.0)
    assert names(runs) == list(RUNS)
    assert len(store.steps("first", attempt=0, after=0, limit=1000)["step"]) == STEPS
    store.close()


def test_rows_on_both_sides_of_a_damaged_page_are_kept(path: Path) -> None:
    size, _ = pages_of(path, "steps")
    marks = [
        n
        for n in range(path.stat().st_size // size)
        if path.read_bytes()[n * size : (n + 1) * size].count(b"second") > 20
    ]
    with path.open("r+b") as file:
        file.seek(size * marks[len(marks) // 2])
        file.write(bytes(size))
    aside = path.rename(path.with_name("aside"))
    target = open_database(path)
    with closing(sqlite3.connect(aside)) as source, closing(target):
        copied = recovery.salvage(source, target)
        found = dict(target.execute("SELECT run, count(*) FROM steps GROUP BY run").fetchall())
    assert (found["first"], found["third"]) == (STEPS, STEPS)
    assert 0 < found["second"] < STEPS
    assert copied["steps"] == sum(found.values()) and copied["runs"] == 3


def test_a_database_that_was_cut_is_set_aside(path: Path) -> None:
    epoch = Store(path)
    before = epoch.epoch
    epoch.close()
    halve(path)
    store, runs = recovery.load(str(path), 0.0)
    assert store.epoch != before
    intake, session = Intake(runs, store, Clock(), ended_seconds=900.0, silent=900.0), Session()
    intake.apply(hello("new", launch_id="new"), session)
    intake.apply(steps(1, [1.0], run="new"), session)
    intake.commit()
    assert intake.storing and intake.positions(session)[0].sequence == 1
    store.close()


def test_a_file_that_is_no_collectors_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"not a database, but long enough to be looked at as if it were one" * 20)
    with pytest.raises(StoreError, match="cannot be used"):
        recovery.load(str(path), 0.0)
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def symlink(path: Path) -> Path:
    link = path.with_name("link")
    link.symlink_to(path)
    return link


def hard_link(path: Path) -> Path:
    link = path.with_name("link")
    link.hardlink_to(path)
    return link


@pytest.mark.parametrize("linked", [symlink, hard_link])
def test_a_second_collector_is_refused_by_whatever_name_it_calls_the_database(
    path: Path, linked: Callable[[Path], Path]
) -> None:
    store, link = Store(path), linked(path)
    with pytest.raises(StoreError, match="in use by another collector"):
        Store(link)
    store.close()
    Store(link).close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_database_that_cannot_be_written_is_refused_at_the_start(
    path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=f"cannot be written: {os.strerror(number)}"):
        Store(path)


def test_while_another_process_holds_the_database_nothing_is_acknowledged_and_nothing_is_lost(tmp_path: Path) -> None:
    store, session = Store(tmp_path / "db"), Session()
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), session)
    intake.apply(steps(1, [1.0, 2.0]), session)
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        intake.commit()
        assert (intake.storing, intake.positions(session)[0].sequence, intake.database_error) == (False, 0, None)
    intake.commit()
    assert (intake.storing, intake.positions(session)[0].sequence) == (True, 2)
    store.close()


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.touch()


def damage(path: Path) -> None:
    """What was committed so far moves from the log to the file; then the file is damaged."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    overwrite_page(path, "steps")


def overwrite(path: Path) -> None:
    """Not even its header is left: a database like any other file."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def empty(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, 0)


async def _until(what: Callable[[], Awaitable[bool]]) -> None:
    while not await what():
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("harm", [remove, replace, damage, overwrite, empty])
def test_a_collector_whose_database_is_lost_begins_again_and_is_sent_what_rings_hold(
    tmp_path: Path, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, ready_file=str(tmp_path / "ready"))
    object.__setattr__(settings, "grpc_port", free_port())
    object.__setattr__(settings, "http_port", free_port())
    ready = Path(settings.ready_file)

    class Address:
        address = f"127.0.0.1:{settings.grpc_port}"

    async def test() -> None:
        running = asyncio.create_task(serve(settings))

        async def is_ready() -> bool:
            assert not running.done(), running.result()
            return ready.exists() and bool(json.loads(ready.read_text()))

        await _until(is_ready)
        stream = Stream(Address())
        await stream.send(hello(), steps(1, [1.0] * 300))
        await stream.stored(300)
        ready.unlink()
        harm(tmp_path / "db")
        await stream.send(steps(301, [1.0] * 300))
        await _until(is_ready)
        await stream.close()
        again = Stream(Address())
        await again.send(hello(), steps(1, [1.0] * 600))
        await again.stored(600)
        await again.close()
        os.kill(os.getpid(), signal.SIGTERM)
        await running

    serving(test())
    with closing(sqlite3.connect(tmp_path / "db")) as database:
        assert database.execute("SELECT count(*), count(DISTINCT sequence) FROM steps").fetchone()[0] >= 300
    store, runs = recovery.load(str(tmp_path / "db"), 0.0)
    run = runs.get("r")
    assert run is not None and run.totals.counters["steps"] == 600
    store.close()
