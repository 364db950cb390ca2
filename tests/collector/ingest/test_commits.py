"""What the collector measures about its commits."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from foreshock_collector.ingest import intake as intake_module
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
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


def test_a_rank_that_claims_a_huge_job_costs_the_memory_of_one_rank() -> None:
    buffer = RecordBuffer(world_size=65_536, layers=0)
    few = RecordBuffer(world_size=3, layers=0)
    for rank in (2, 0):
        records = decode(steps(1, [1.0] * 50, local_norm=[1.0 + rank] * 50, flags=[pb.LOCAL_NORMS] * 50).steps, 0)
        for each, place in ((buffer, 60_000 + rank), (few, rank)):
            each.write(place, records, 0.0)
    assert buffer._cells.nbytes < 2 * few._cells.nbytes
    ranks, rows = buffer.records(7)
    assert ranks.tolist() == [60_000, 60_002] and rows["local_norm"].tolist() == [1.0, 3.0]
    at = np.array([7])
    assert_array_equal(buffer.local_norms(at), [[1.0, 3.0, math.nan]])
    assert_array_equal(few.local_norms(at), [[1.0, 3.0, math.nan]])
    assert_array_equal(few.rank_norms(at), [[1.0, math.nan, 3.0]])
    few.write(1, records, 0.0)
    assert_array_equal(few.local_norms(at), [[1.0, 1.0, 3.0]])
    (step, *_) = few.finalize(0, 50)
    assert step.ranks == 3


def test_a_model_of_very_many_layers_costs_bounded_memory_and_its_newest_steps_have_them() -> None:
    layers = 65_536
    buffer = RecordBuffer(world_size=1, layers=layers)
    for first in range(1, 101, 4):
        norms = np.repeat(np.arange(first, first + 4, dtype="f4"), layers)
        told = steps(first, [1.0] * 4, global_layer_norms=norms, weight_rows=range(4), update_layer_ratios=norms)
        buffer.write(0, decode(told.steps, layers), 0.0)
    assert buffer._layer_norms.nbytes <= 16 * 2**20
    weights = buffer.weights.between(1, 100)
    assert weights.blocks.nbytes <= 16 * 2**20
    newest = buffer.layer_norms(100)
    assert newest is not None and set(newest.tolist()) == {100.0} and buffer.layer_norms(1) is None
    assert set(weights.block("update_layer_ratios")[-1].tolist()) == {100.0}
    assert_array_equal(buffer.layer_norms_of(np.array([36, 37]))[:, 0], [math.nan, 37.0])


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


def test_a_commit_in_parts_lets_others_in_between_and_forgets_nothing_urgent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "_PART_SECONDS", 0.0)
    clock, session, store = Clock(), Session(), Store(tmp_path / "db")
    runs = Runs()
    intake = Intake(runs, store, clock, ended_seconds=900.0, silent=900.0)
    for name in ("a", "b", "c"):
        intake.apply(hello(name, launch_id=name), session)
        intake.apply(steps(1, [1.0], run=name), session)
    clock.now += 5.0
    parts = intake.commit_in_parts()
    next(parts)
    assert [run.changed for run in runs] == [False, True, True]
    assert [run.totals.counters["steps"] for run in runs] == [1, 0, 0]
    intake.apply(steps(2, [math.nan], run="a"), session)
    assert len(list(parts)) == 2
    assert intake.urgent == {"a-0"}
    assert intake.commit_urgent() == {"a-0"}
    store.close()


def test_the_end_of_a_stream_commits_its_own_runs(tmp_path: Path) -> None:
    clock, ending, other, store = Clock(), Session(), Session(), Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    for name, session in (("a", ending), ("b", other)):
        intake.apply(hello(name, launch_id=name), session)
        intake.apply(steps(1, [1.0], run=name), session)
    intake.commit_session(ending)
    assert [[each.sequence for each in intake.positions(session)] for session in (ending, other)] == [[1], [0]]
    store.close()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_a_buffer_takes_memory_for_the_records_that_have_come_and_no_more() -> None:
    """It has room for 512 steps of 64 ranks, 6 MiB; these are ten of each."""
    before = resident_mib()
    buffers = [RecordBuffer(world_size=64, layers=0) for _ in range(128)]
    records = decode(steps(1, [1.0] * 10).steps, 0)
    for buffer in buffers:
        for rank in range(64):
            buffer.write(rank, records, 0.0)
    grown = resident_mib() - before
    assert grown < 256, f"{grown} MiB, of {128 * 6}"
