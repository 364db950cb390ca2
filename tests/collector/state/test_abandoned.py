"""What a script observed or measured and then left out: counted apart, judged by whether training goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.job_in_memory import NAN, RANK_COLUMNS, Job

LEFT_OUT = RANK_COLUMNS | pb.NOT_STEPPED
TOLD_ONLY = LEFT_OUT | pb.GRADIENT_UNKNOWN


def leave_out(job: Job, *losses: float) -> None:
    """A batch that the script left out before its backward pass; a loss for each rank."""
    for rank, loss in enumerate(losses):
        job.tell(rank, [0.0], loss=[loss], flags=[TOLD_ONLY], local_norm=[0.0])
    job.settle(1.0)


def test_a_step_left_out_is_counted_apart_and_its_nan_too() -> None:
    job = Job()
    job.train(60)
    leave_out(job, 2.0, NAN)
    job.train(10)
    totals = job.run.totals
    assert (totals.counters["steps"], totals.counters["abandoned"]) == (70, 1)
    assert totals.nonfinite == {"loss nan": 1, "loss inf": 0, "gradient nan": 0, "gradient inf": 0}
    # The script has taken care of it.
    assert job.causes() == []


def test_what_was_not_measured_is_neither_a_norm_nor_one_that_is_not_finite() -> None:
    job = Job(layers=2)
    job.train(60)
    before = list(job.run.totals.norms.counts)
    leave_out(job, 2.0, 2.0)
    (step,) = [step for step in job.run.newest.steps if not step.stepped]
    assert math.isnan(step.global_norm) and step.nonfinite == [] and step.loss == 2.0
    assert job.run.totals.norms.counts == before
    assert all(instance.local_norm for instance in job.run.newest.instances.values())


@pytest.mark.parametrize("reason", [pb.ExitReason.EXCEPTION, pb.ExitReason.FINISHED, pb.ExitReason.DETACHED])
def test_a_run_that_ends_at_its_own_nan_guard_has_an_incident_at_that_step(reason: pb.ExitReason) -> None:
    job = Job()
    job.train(60)
    leave_out(job, 2.0, NAN)
    assert job.causes() == []
    for rank in range(2):
        job.leave(rank, reason, "exit code 1" if reason == pb.ExitReason.EXCEPTION else "")
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank, verdict.first_bad_step) == ("sudden_nonfinite", 1, 60)


def test_a_step_left_out_is_no_failure_where_a_user_interrupts_the_run_or_where_a_rank_left_before_it() -> None:
    job = Job()
    job.train(60)
    leave_out(job, 2.0, NAN)
    for rank in range(2):
        job.leave(rank, pb.ExitReason.INTERRUPTED, "KeyboardInterrupt")
    job.settle(5.0)
    assert job.causes() == []
    job = Job()
    job.train(60)
    job.leave(1, pb.ExitReason.DETACHED)
    job.settle(1.0)
    job.tell(0, [0.0], loss=[NAN], flags=[TOLD_ONLY], local_norm=[0.0])
    job.settle(5.0)
    assert job.causes() == []
    job.leave(0, pb.ExitReason.EXCEPTION, "exit code 1")
    job.settle(5.0)
    assert job.causes() == ["sudden_nonfinite"]


def test_a_guard_that_ends_an_explosion_tells_it_with_its_lead() -> None:
    job = Job()
    job.train(60)
    for norm in (10.0, 100.0, 1e4, 1e6, 1e9):
        for rank in range(2):
            job.tell(rank, [norm])
        job.settle(1.0)
    leave_out(job, NAN, NAN)
    for rank in range(2):
        job.leave(rank, pb.ExitReason.EXCEPTION, "exit code 1")
    job.settle(1.0)
    verdict = job.run.incidents.kept[-1].verdict
    assert (verdict.cause, verdict.first_bad_step) == ("exploding_gradients", 65)
    assert verdict.lead_steps >= 3


def test_a_guard_that_leaves_out_batch_after_batch_is_a_failure_while_the_run_lives() -> None:
    job = Job()
    job.train(60)
    for count in range(1, DEFAULT.collapse_after + 1):
        leave_out(job, NAN, NAN)
        assert bool(job.causes()) == (count == DEFAULT.collapse_after)


def test_a_nan_in_the_loss_that_only_a_scaler_left_out_is_a_failure_and_an_overflow_is_none() -> None:
    job = Job()
    scaled: dict[str, Any] = {"flags": [LEFT_OUT], "loss_scale": [1024.0]}
    job.train(60)
    for loss in (math.inf, 2.0):
        for rank in range(2):
            job.tell(rank, [math.inf], loss=[loss], local_inf_parameters=[1.0], **scaled)
        job.settle(1.0)
        job.train(5)
    assert job.causes() == []
    for rank in range(2):
        job.tell(rank, [NAN], loss=[NAN], local_nan_parameters=[1.0], **scaled)
    job.settle(1.0)
    assert job.causes() == ["sudden_nonfinite"]


@pytest.mark.parametrize("reason", [pb.ExitReason.FINISHED, pb.ExitReason.DETACHED, pb.ExitReason.INTERRUPTED])
def test_a_run_whose_last_step_a_scaler_left_out_has_ended_well(reason: pb.ExitReason) -> None:
    job = Job()
    job.train(60)
    for rank in range(2):
        job.tell(rank, [math.inf], local_inf_parameters=[1.0], flags=[LEFT_OUT], loss_scale=[1024.0])
        job.leave(rank, reason)
    for _ in range(5):
        job.settle(1.0)
    assert job.causes() == []


def test_finite_gradients_that_a_script_drops_without_a_word_are_nothing() -> None:
    job = Job()
    job.train(60)
    for rank in range(2):
        job.tell(rank, [1.0], flags=[pb.LOCAL_NORMS | pb.NOT_STEPPED])
    job.settle(1.0)
    assert (job.run.totals.counters["steps"], job.run.totals.counters["abandoned"]) == (60, 0)
