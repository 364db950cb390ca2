"""What the collector measures about its commits."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps


@pytest.fixture
def errors_expected() -> None:
    """A failed commit is logged as an error."""


def test_records_that_wait_for_a_commit_are_the_ingest_lag_and_failed_commits_are_timed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, errors_expected: None
) -> None:
    clock, session = Clock(), Session()
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    statistics = intake.statistics
    intake.apply(hello(), session)
    intake.apply(hello("other", launch_id="other"), session)
    intake.commit()
    assert (statistics.lag_seconds(clock()), sum(statistics.commit_seconds.counts)) == (0.0, 1)
    intake.commit()
    assert sum(statistics.commit_seconds.counts) == 1  # there was nothing to commit

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", full)
        intake.apply(steps(1, [1.0]), session)
        clock.now += 5
        intake.apply(steps(1, [1.0], run="other"), session)
        for _ in range(7):
            clock.now += 1
            intake.commit()
        assert (statistics.lag_seconds(clock()), sum(statistics.commit_seconds.counts)) == (12.0, 8)
    intake.apply(pb.FromRecorder(steps=pb.StepBatch(instance="r-0")), session)
    intake.commit()
    assert statistics.lag_seconds(clock()) == 0.0
    intake.apply(pb.FromRecorder(steps=pb.StepBatch(instance="r-0")), session)  # alive, without records
    clock.now += 30
    assert statistics.lag_seconds(clock()) == 0.0
    store.close()
    assert [record.getMessage() for record in caplog.records] == [
        "cannot commit: No space left on device; nothing is acknowledged until a commit succeeds",
        "commits succeed again",
    ]


def test_records_that_are_refused_wait_for_no_commit(tmp_path: Path) -> None:
    clock, session = Clock(), Session()
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), session)
    intake.commit()
    intake.apply(steps(1, [1.0], loss=[1.0, 2.0]), session)
    assert "column loss" in session.refused["r-0"]
    intake.commit()
    clock.now += 60
    assert intake.statistics.lag_seconds(clock()) == 0.0
    store.close()
