"""Ended runs leave memory when there are many of them, and come back when somebody asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state import fleet
from foreshock_collector.state.retention import Retention
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps

KEPT = 3
DAY = 86400.0


@pytest.fixture(autouse=True)
def few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ENDED_KEPT", KEPT)


class Collector:
    """A collector's state, and runs that end."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock, self.session = path, clock, Session()
        self.store = Store(path)
        self.runs = self.store.load(clock())
        retention = Retention(self.store, seconds=28 * DAY, most_bytes=1e12, silent=900.0)
        self.intake = Intake(self.runs, self.store, clock, ended_seconds=900.0, silent=900.0, retention=retention)

    def run(self, name: str, *, launch: str = "first", count: int = 5, first: int = 1, experiment: str = "e") -> Run:
        instance = f"{name}-{launch}"
        self.intake.apply(hello(name, launch_id=launch, instance=instance, experiment=experiment), self.session)
        self.intake.apply(steps(first, [1.0] * count, instance=instance), self.session)
        left = pb.Exit(instance=instance, reason=pb.ExitReason.FINISHED, last_sequence=first + count - 1)
        self.intake.apply(pb.FromRecorder(exit=left), self.session)
        self.intake.commit()
        found = self.runs.find(instance)
        assert found is not None
        return found[0]

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.intake.commit()
        self.intake.expire()

    def in_memory(self) -> list[str]:
        return sorted(run.name for run in self.runs)


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    """One with many ended runs."""
    made = Collector(tmp_path / "db", Clock())
    for number in range(10):
        made.run(f"r{number}")
        made.wait(1000)
    return made


def test_the_newest_of_many_ended_runs_stay_in_memory_and_another_is_there_until_it_is_old_again(
    collector: Collector,
) -> None:
    assert collector.in_memory() == ["r7", "r8", "r9"]
    assert sorted(collector.runs.archived) == [f"r{number}" for number in range(7)]
    run = collector.runs.get("r2")
    assert run is not None and collector.in_memory() == ["r2", "r7", "r8", "r9"]
    assert (run.totals.steps, run.newest.over, run.ended_for(collector.clock(), 900.0)) == (5, True, 8000.0)
    collector.wait(10)
    assert collector.in_memory() == ["r7", "r8", "r9"] and "r2" in collector.runs.archived
    assert collector.runs.get("r77") is None
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


def test_a_stream_that_is_still_open_has_the_positions_of_runs_that_left_memory(collector: Collector) -> None:
    positions = {each.instance: each for each in collector.intake.positions(collector.session)}
    assert [(positions[f"r{n}-first"].sequence, positions[f"r{n}-first"].closed) for n in range(10)] == [(5, True)] * 10
    collector.store.close()


def test_a_collector_that_starts_has_as_few_in_memory_as_before(collector: Collector) -> None:
    before = collector.in_memory(), collector.runs.archived
    collector.store.close()
    again = Collector(collector.path, collector.clock)
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
