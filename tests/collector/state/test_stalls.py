"""A run that makes no step though its ranks are there: after how long, and which rank is named."""

from __future__ import annotations

import pytest

from foreshock_collector.state.condition import condition
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.job_in_memory import FAST, Job


@pytest.mark.parametrize(
    ("passes", "rank", "says"),
    [
        ((32, 31, 32), 1, "rank 1 has not arrived"),
        ((31, 31, 32), None, "ranks 0, 1 have not arrived"),
        ((32, 32, 32), 1, "rank 1 has not finished step 30"),
        ((0, 0, 0), 1, "rank 1 has not finished step 30"),
    ],
)
def test_a_run_whose_ranks_live_and_make_no_step_has_stalled_until_it_makes_one(
    passes: tuple[int, ...], rank: int | None, says: str
) -> None:
    job = Job(ranks=3)
    job.train(30)
    for each in (0, 2):
        job.tell(each, [1.0])
    for each, count in enumerate(passes):
        job.computed(each, count)
    job.settle(11.0)
    for _ in range(4):
        job.now += 30.0
        job.heartbeat()
        job.settle()
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "running")
    job.now += 30.0
    job.heartbeat()
    job.settle()
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank, verdict.first_bad_step) == ("stalled", rank, 30)
    assert says in verdict.summary
    assert condition(job.run, job.now, 900.0) == "stalled"
    job.tell(1, [1.0])
    job.train(1)
    assert job.causes(only_open=True) == []


def test_a_run_whose_ranks_step_again_after_they_had_finished_has_not_stalled_and_waits_for_all_of_them() -> None:
    job = Job(ranks=2)
    job.train(30)
    for rank in (0, 1):
        job.leave(rank, pb.ExitReason.FINISHED)
    job.settle()
    assert condition(job.run, job.now, 900.0) == "ended"
    job.now += 7200.0
    job.tell(1, [1.0])
    job.settle()
    assert (condition(job.run, job.now, 900.0), job.causes()) == ("running", [])
    assert job.run.newest.finalized == 30
    job.tell(0, [1.0])
    job.settle()
    assert [step.ranks for step in job.run.newest.steps][-1] == 2
    for rank in (0, 1):
        job.leave(rank, pb.ExitReason.INTERRUPTED)
    job.settle(10.0)
    assert (condition(job.run, job.now, 900.0), job.causes()) == ("interrupted", [])


@pytest.mark.parametrize("left", [False, True])
def test_a_stall_never_says_that_all_have_arrived_where_a_rank_is_not_there(left: bool) -> None:
    job = Job(ranks=3)
    job.train(30)
    if left:
        job.leave(2, pb.ExitReason.FINISHED)
    for _ in range(7):
        job.now += 20.0
        for rank in (0, 1):
            job.computed(rank, 31)
        job.settle()
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank) == ("stalled", 2)
    assert "although other ranks are alive: rank 2 is missing." in verdict.summary
    assert verdict.evidence[1:] == ("its other ranks still report", "left or silent: rank 2")


def test_a_stall_goes_on_while_the_collector_starts_again() -> None:
    job = Job(ranks=2)
    job.train(30)
    for _ in range(3):
        job.now += 60.0
        job.heartbeat()
        job.settle()
    store = Store(":memory:")
    store.commit(job.runs)
    job.now += 90.0
    job.runs = store.load(job.now, lambda _: FAST)
    job.settle()
    assert job.causes(only_open=True) == ["stalled"]
    job.now += 50.0
    job.heartbeat()
    job.settle(50.0)
    assert job.causes(only_open=True) == ["stalled"]
    job.train(1)
    assert (job.causes(), job.causes(only_open=True)) == (["stalled"], [])
    store.close()


def test_what_was_open_in_an_attempt_whose_machine_vanished_is_over_once_another_goes_on() -> None:
    job = Job(ranks=2)
    job.train(60, alike=True)
    for _ in range(3):
        job.now += 60.0
        job.heartbeat()
        job.settle()
    assert job.causes(only_open=True) == ["duplicate_data", "stalled"]
    job.now += 120.0
    job.start_again()
    job.train(1)
    assert job.causes(only_open=True) == []
    assert (job.run.evicted, condition(job.run, job.now, 900.0)) == (False, "running")


def test_the_first_steps_of_an_attempt_have_ten_minutes_each_be_there_one_or_none() -> None:
    for made in (0, 1, 9):
        job = Job(ranks=2)
        if made:
            job.train(made)
        for _ in range(20):
            job.now += 30.0
            job.heartbeat()
            job.settle()
        assert job.causes() == []
        job.now += 30.0
        job.heartbeat()
        job.settle()
        assert job.causes() == ["stalled"]


@pytest.mark.parametrize(("duration", "limit"), [(0.1, 120.0), (30.0, 600.0), (600.0, 1800.0)])
def test_a_stall_is_twenty_usual_steps_and_never_under_two_minutes_or_over_thirty(
    duration: float, limit: float
) -> None:
    job = Job(ranks=1)
    job.tell(0, [1.0] * 20, monotonic_seconds=[duration * i for i in range(1, 21)])
    job.settle(1.0)
    assert job.run.stall_threshold() == pytest.approx(limit)


def test_of_a_stall_in_which_all_have_come_equally_far_nobody_is_named() -> None:
    job = Job(ranks=3)
    job.train(30)
    for rank in range(3):
        job.computed(rank, 31)
    job.now += 130.0
    job.heartbeat()
    job.settle()
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("stalled", None)
    assert "all ranks have come equally far" in incident.verdict.summary


def test_a_run_nobody_hears_of_is_silent_and_not_stalled() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.settle(5000.0)
    assert job.causes() == []
