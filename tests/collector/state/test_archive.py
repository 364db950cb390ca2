"""Ended runs leave memory when there are many of them, and come back when they go on."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.state import fleet
from foreshock_collector.state.runs import Run
from foreshock_collector.web.live import ChangeStreams
from tests.support.ended_runs import DAY, Collector, with_ten_ended_runs
from tests.support.streams import hello, steps

KEPT = 3


@pytest.fixture(autouse=True)
def few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ENDED_KEPT", KEPT)


@pytest.fixture
def errors_expected() -> None:
    """A database that is damaged is logged as an error."""


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    return with_ten_ended_runs(tmp_path / "db")


def test_the_newest_of_many_ended_runs_stay_in_memory_and_another_is_there_until_it_is_old_again(
    collector: Collector,
) -> None:
    assert collector.in_memory() == ["r7", "r8", "r9"]
    assert sorted(collector.runs.archived) == [f"r{number}" for number in range(7)]
    run = collector.run("r2", launch="second")
    assert (run.totals.steps, run.newest.over, run.ended_for(collector.clock(), 900.0)) == (10, True, 0.0)
    assert collector.in_memory() == ["r2", "r7", "r8", "r9"] and "r2" not in collector.runs.archived
    collector.wait(1)
    for name in ("r10", "r11", "r12"):
        collector.run(name)
        collector.wait(1000)
    assert collector.in_memory() == ["r10", "r11", "r12"] and collector.runs.archived["r2"].steps == 10
    collector.store.close()


def test_whoever_reads_a_run_that_left_memory_brings_nothing_back_and_reads_it_once(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, restored = list[str](), collector.store.restored

    def counted(run: str, *more: Any) -> Run | None:
        read.append(run)
        return restored(run, *more)

    monkeypatch.setattr(collector.store, "restored", counted)
    live = ChangeStreams(runs=collector.runs, clock=collector.clock, silent=900.0)
    seen = [live.fingerprints("r2")]
    assert read == []
    run = collector.runs.get("r2")
    assert run is not None and run.evicted
    assert (run.totals.steps, run.newest.over, run.ended_for(collector.clock(), 900.0)) == (5, True, 8000.0)
    seen.append(live.fingerprints("r2"))
    collector.wait(10)
    seen.append(live.fingerprints("r2"))
    assert (collector.runs.get("r2") is run, read) == (True, ["r2"])
    assert (collector.in_memory(), seen) == (["r7", "r8", "r9"], [seen[0]] * 3)
    # What another launch adds is seen.
    collector.run("r2", launch="second")
    assert live.fingerprints("r2") != seen[0]
    for number in range(KEPT):
        collector.wait(1000)
        collector.run(f"r1{number}")
    collector.wait(1000)
    again = collector.runs.get("r2")
    assert again is not None and again.totals.steps == 10 and read == ["r2"] * 3
    assert (collector.runs.get("r77"), collector.runs.experiment_of("r77")) == (None, None)
    collector.store.close()


@pytest.mark.parametrize("set_by", [3600.0, -3600.0])
def test_a_clock_that_is_set_moves_the_times_of_runs_that_left_memory(collector: Collector, set_by: float) -> None:
    first = collector.runs.get("r2")
    assert first is not None
    ages = collector.clock() - first.last_report(), collector.clock() - first.totals.last["step"]
    collector.clock.now += set_by
    collector.runs.move_clock(set_by)
    read = collector.runs.get("r2")
    (listed,) = (run for run in collector.listed()["runs"] if run["run"] == "r2")
    found = collector.runs.find("r2-first")
    assert read is not None and found is not None and found[0] is not read
    for run in (read, found[0]):
        assert (collector.clock() - run.last_report(), collector.clock() - run.totals.last["step"]) == ages
    # Ended long ago: it has no series, which alerts could read as new.
    assert found[0].ended_for(collector.clock(), 900.0) > 900.0
    assert tuple(collector.clock() - listed[f"last_{what}_seconds"] for what in ("report", "step")) == ages
    collector.store.close()


def test_a_run_that_can_no_longer_be_decoded_is_set_aside_and_keeps_its_name(
    collector: Collector, errors_expected: None
) -> None:
    for name in ("r0", "r1", "r2", "r3"):
        collector.damage(name)
    # Another launch of its name, its first launch again, a message of its instance, somebody who reads it.
    collector.intake.apply(hello("r0", launch_id="second", instance="r0-second"), collector.session)
    found = collector.runs.find("r0-second")
    assert found is not None and (found[0].name, len(found[0].attempts)) == ("r0-2", 1)
    assert collector.run("r0").name == "r0-3"
    again = collector.run("r1")
    assert (again.name, len(again.attempts), again.totals.steps) == ("r1-2", 1, 5)
    with pytest.raises(LookupError, match="r2-first"):
        collector.intake.apply(steps(6, [1.0], instance="r2-first"), collector.session)
    assert collector.run("r2", first=6).totals.steps == 5
    assert collector.runs.get("r3") is None and collector.runs.get("r3") is None
    assert collector.runs.errors.nonzero() == {"load": 4}
    others = {f"r{number}" for number in range(4, 10)}
    assert {run["run"] for run in collector.listed()["runs"]} == {"r0-2", "r0-3", "r1-2", "r2-2"} | others
    assert not collector.session.refused
    assert [name for name in (f"r{number}" for number in range(10)) if collector.store.is_set_aside(name)] == [
        *("r0", "r1", "r2", "r3")
    ]
    collector.store.close()


def test_a_database_that_is_damaged_where_a_run_left_memory_is_replaced(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, errors_expected: None
) -> None:
    def malformed(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(collector.store, "restored", malformed)
    collector.intake.apply(hello("r0", launch_id="second", instance="r0-second"), collector.session)
    # Whoever serves the intake begins again with another database, and so does each stream.
    assert isinstance(collector.intake.database_error, sqlite3.DatabaseError)
    collector.store.close()


def test_a_run_that_comes_back_from_the_store_goes_on_counting(collector: Collector) -> None:
    # Its first launch again, which sends two steps that are stored and two that are new.
    assert collector.run("r0", first=4, count=4).totals.counters["steps"] == 7
    again = collector.run("r1", launch="second")
    assert (again.name, len(again.attempts), again.totals.counters["steps"]) == ("r1", 2, 10)
    other = collector.run("r2", launch="other", experiment="another")
    assert (other.name, "r2" in collector.runs.archived) == ("r2-2", True)
    assert {"r0", "r1", "r2-2"} <= set(collector.in_memory())
    collector.store.close()


def test_a_stream_that_stays_open_keeps_no_ended_run_in_memory(collector: Collector) -> None:
    def acknowledged() -> dict[str, tuple[int, bool]]:
        positions = collector.intake.positions(collector.session)
        return {each.instance: (each.sequence, each.closed) for each in positions}

    newest = {f"r{number}-first": (5, True) for number in (7, 8, 9)}
    assert acknowledged() == newest and collector.in_memory() == ["r7", "r8", "r9"]
    # One that steps again is back at once.
    collector.intake.apply(steps(4, [1.0] * 4, instance="r2-first"), collector.session)
    collector.intake.commit()
    assert acknowledged() == newest | {"r2-first": (7, False)}
    collector.store.close()


def test_a_collector_that_starts_has_as_few_in_memory_as_before(collector: Collector) -> None:
    before = collector.in_memory(), collector.runs.archived
    collector.store.close()
    again = Collector(collector.path, collector.clock)
    again.intake.expire()
    assert (again.in_memory(), again.runs.archived) == before
    assert again.run("r3", launch="second").totals.counters["steps"] == 10
    again.store.close()


def test_the_steps_of_runs_that_left_memory_go_when_they_are_old(collector: Collector) -> None:
    def steps_of(run: str) -> list[int]:
        return list(collector.store.steps(run, attempt=0, after=0, limit=100)["sequence"])

    collector.clock.now += 28 * DAY - 8500
    collector.intake.expire()
    collector.intake.expire()
    assert [len(steps_of(f"r{number}")) for number in range(4)] == [0, 0, 5, 5]
    collector.store.close()


def test_a_collector_that_starts_keeps_the_series_of_runs_that_have_just_ended(collector: Collector) -> None:
    names = [f"short{number}" for number in range(2 * KEPT)]
    for name in names:
        collector.run(name, count=0)
    collector.store.close()
    collector.clock.now += 60
    again = Collector(collector.path, collector.clock)
    assert set(names) <= set(again.in_memory())
    again.wait(900)
    assert len(again.in_memory()) == KEPT
    again.store.close()
