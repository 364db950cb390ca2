"""Steps that are old, or too many: they go before the disk is full, and the incidents stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state import store
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.retention import Retention
from foreshock_collector.state.schema import TABLES
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps

DAY = 86400.0


@pytest.fixture
def errors_expected() -> None:
    """A run that cannot be decoded is logged as an error."""


class Kept:
    """A collector's state, with runs that end or go on."""

    def __init__(self, path: Path, *, seconds: float = 28 * DAY, most_bytes: float = math.inf) -> None:
        self.clock, self.store, self.session = Clock(), Store(path), Session()
        retention = Retention(self.store, seconds=seconds, most_bytes=most_bytes, silent=900.0)
        self.intake = Intake(Runs(), self.store, self.clock, ended_seconds=900.0, silent=900.0, retention=retention)

    def run(self, name: str, count: int, *, ends: bool = True) -> None:
        self.intake.apply(hello(name, launch_id=name), self.session)
        for first in range(1, count + 1, 500):
            some = steps(first, [1.0] * 499 + [math.nan], run=name, global_nan_parameters=[0] * 499 + [1])
            self.intake.apply(some, self.session)
            self.intake.commit()
        if ends:
            left = pb.Exit(instance=f"{name}-0", reason=pb.ExitReason.FINISHED, last_sequence=count)
            self.intake.apply(pb.FromRecorder(exit=left), self.session)
        self.intake.commit()

    def wait(self, seconds: float, *, alive: str = "") -> None:
        self.clock.now += seconds
        if alive:
            self.intake.apply(pb.FromRecorder(steps=pb.StepBatch(instance=f"{alive}-0")), self.session)
        for _ in range(4):
            self.intake.expire()

    def sequences(self, run: str) -> list[int]:
        return list(self.store.steps(run, attempt=0, after=0, limit=10**6)["sequence"])


def test_the_steps_of_a_run_that_ended_long_ago_go_and_its_incidents_and_other_runs_stay(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "db")
    kept.run("old", 1000)
    kept.run("live", 1000, ends=False)
    kept.wait(28 * DAY - 1, alive="live")
    kept.run("new", 1000)
    assert kept.sequences("old") == list(range(1, 1001))
    kept.wait(2, alive="live")
    assert kept.sequences("old") == []
    assert kept.store.incident_window("old", 1) is not None
    assert kept.sequences("live") == kept.sequences("new") == list(range(1, 1001))
    kept.store.close()


def test_above_the_size_the_oldest_steps_go_first_and_a_live_run_keeps_its_newest(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "db")
    kept.run("old", 2000)
    kept.clock.now += 10
    kept.run("live", 2000, ends=False)
    kept.store.close()
    full = Kept(tmp_path / "db", most_bytes=1.0)
    runs = full.store.load(full.clock() + 100)
    retention = Retention(full.store, seconds=28 * DAY, most_bytes=1.0, silent=900.0)
    used = full.store.used_bytes()
    retention.delete_some(runs, full.clock())
    assert full.sequences("old")[:1] != [1] and len(full.sequences("live")) == 2000
    for _ in range(3):
        retention.delete_some(runs, full.clock())
    assert full.sequences("live") == list(range(2000 - 511, 2001))
    assert full.store.used_bytes() < used
    full.store.close()


def test_a_run_that_goes_on_after_its_steps_went_is_deleted_again_in_its_turn(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "db", most_bytes=1.0)
    kept.run("night", 2000, ends=False)
    kept.wait(10)
    assert len(kept.sequences("night")) == 512
    kept.intake.apply(steps(2001, [1.0] * 500, run="night"), kept.session)
    kept.intake.commit()
    assert len(kept.sequences("night")) == 1012
    kept.wait(10)
    assert kept.sequences("night") == list(range(2500 - 511, 2501))
    kept.store.close()


def test_a_run_that_was_set_aside_goes_first_some_rows_at_a_time_and_its_name_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors_expected: None
) -> None:
    monkeypatch.setattr(store, "_DELETED_STEPS", 1000)
    kept = Kept(tmp_path / "db")
    kept.run("odd", 2000)
    kept.run("whole", 2000)
    kept.store.close()
    full = Kept(tmp_path / "db", most_bytes=1.0)
    database = full.store._db
    database.execute("UPDATE runs SET state=x'80' WHERE run='odd'")
    before = database.total_changes
    runs = full.store.load(full.clock())
    # Its rows were not touched, which would take long.
    assert database.total_changes - before < 10
    assert [run.name for run in runs] == ["whole"] and len(full.sequences("odd")) == 2000
    retention = Retention(full.store, seconds=28 * DAY, most_bytes=1.0, silent=900.0)
    left = []
    while full.store.is_set_aside("odd"):
        retention.delete_some(runs, full.clock())
        left.append(len(full.sequences("odd")))
    assert left[:2] == [1000, 0] and len(full.sequences("whole")) == 2000
    tables = [name for name in TABLES if name not in ("meta", "runs")]
    assert [database.execute(f"SELECT 1 FROM {name} WHERE run='odd'").fetchone() for name in tables] == [None] * 6
    retention.delete_some(runs, full.clock())
    assert len(full.sequences("whole")) < 2000
    full.store.close()
