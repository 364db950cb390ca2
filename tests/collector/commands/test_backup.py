"""`foreshock backup`: a whole copy of a database that is in use, or none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from foreshock_collector.commands.backup import main
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from tests.support.clock import Clock
from tests.support.streams import hello, steps


def test_a_database_that_a_collector_writes_is_copied_as_it_is_at_one_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, session, copy = Store(tmp_path / "db"), Session(), tmp_path / "copy"
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), session)
    for first in (1, 101):
        intake.apply(steps(first, [1.0] * 100), session)
        intake.commit()
        assert main([str(tmp_path / "db"), str(copy)]) == 0
        assert capsys.readouterr().out == f"{copy}: {copy.stat().st_size:,} bytes\n"
        copied = Store(copy)
        (run,) = copied.load(0.0)
        assert run.totals.counters["steps"] == first + 99
        copied.close()
    intake.apply(steps(201, [1.0]), session)
    intake.commit()
    assert intake.storing
    store.close()


def test_what_cannot_be_copied_leaves_the_older_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "db").close()
    copy, notes = tmp_path / "copy", tmp_path / "notes"
    assert main([str(tmp_path / "db"), str(copy)]) == 0
    before = copy.read_bytes()
    notes.write_text("no database")
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE t (a)")
    for source, target, says in (
        ("nowhere", "copy", "No such file or directory"),
        ("notes", "copy", "file is not a database"),
        ("other", "copy", "is not a Foreshock database"),
        ("db", "db", "is the database itself"),
        ("db", "nowhere/copy", "cannot be copied"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / target)]) == 2
        assert says in capsys.readouterr().err
    assert copy.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir() if "draft" in each.name) == []
