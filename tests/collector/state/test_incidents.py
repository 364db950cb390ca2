"""What becomes an incident, when it is judged anew, and when it is over."""

from __future__ import annotations

import pytest

from foreshock_collector.analysis.loss_trend import FIRST_STEPS
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.state.condition import condition
from foreshock_collector.state.encoding import encode
from foreshock_collector.state.store import Store
from foreshock_collector.web.answers import verdict_answer
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.job_in_memory import FAST, NAN, RANK_COLUMNS, Job
from tests.support.streams import steps


def test_a_failure_is_one_incident_however_many_ranks_and_steps_and_ends_after_enough_good_ones() -> None:
    job = Job(ranks=3)
    job.train(60)
    for _ in range(4):
        for rank in range(3):
            job.tell(rank, [NAN], loss=[NAN], local_nan_parameters=[3.0])
        job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.first_bad_step, incident.last_bad_step, incident.bad_steps) == (60, 63, 4)
    assert incident.updated_seconds > incident.opened_seconds
    job.train(DEFAULT.recovered_after - 1)
    assert job.causes(only_open=True) == ["sudden_nonfinite"]
    job.train(1)
    assert job.causes(only_open=True) == []
    assert sum(job.run.totals.incidents.values()) == 1


def test_a_rank_that_tells_late_what_it_did_changes_the_verdict() -> None:
    job = Job(ranks=2)
    job.train(60)
    job.tell(0, [NAN], loss=[2.0])
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("nonfinite_gradient", None)
    store = Store(":memory:")
    store.commit(job.runs)
    job.tell(1, [NAN], loss=[2.0], local_nan_parameters=[3.0])
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("bad_rank", 1)
    assert job.run.totals.incidents["bad_rank"] == job.run.totals.incidents["nonfinite_gradient"] == 1
    store.commit(job.runs)
    window = store.incident_window("r", incident.number)
    assert window is not None
    assert window.records["rank"][window.records["sequence"] == incident.sequence].tolist() == [0, 1]
    store.close()


def test_a_late_record_of_a_failure_behind_too_many_incidents_changes_nothing() -> None:
    job = Job(ranks=2)
    job.train(60)
    job.tell(0, [NAN], loss=[2.0])
    job.settle(5.0)
    assert job.causes(only_open=True) == ["nonfinite_gradient"]
    job.run.incidents.kept.clear()
    job.tell(1, [NAN], loss=[2.0], local_nan_parameters=[3.0])
    job.settle(1.0)
    assert not job.run.errors.nonzero()
    assert job.causes() == []
    assert job.run.newest.detector.failing


def test_ranks_that_see_the_same_data_are_named_once_until_they_no_longer_do() -> None:
    job = Job(ranks=4)
    job.train(100)
    assert job.causes() == []
    job.train(60, alike=True)
    job.train(5)
    job.train(60, alike=True)
    assert job.causes() == ["duplicate_data"]
    (incident,) = job.run.incidents.kept
    assert incident.verdict.first_bad_step == 100
    assert "DistributedSampler" in incident.verdict.try_[0]
    job.train(60)
    assert job.causes(only_open=True) == []


def test_a_rank_out_of_all_proportion_is_an_outlier_and_nothing_is_said_of_a_nan() -> None:
    job = Job(ranks=3)
    job.train(60)
    assert job.causes() == []
    for rank in range(3):
        job.tell(rank, [1.0] * 60, local_norm=[40.0 if rank == 1 else 1.0 + 0.1 * rank] * 60)
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank, verdict.first_bad_step) == ("outlier_rank", 1, 60)
    answer = verdict_answer(verdict)
    assert (answer["runbook"], answer["finite"]) == ("ForeshockTrainingFault", True)


def test_one_rank_is_never_its_own_duplicate() -> None:
    job = Job(ranks=1)
    job.train(100, alike=True)
    assert job.causes() == []


def test_a_layer_that_gets_no_gradient_to_speak_of_is_named_and_a_frozen_one_is_not() -> None:
    for smallest, found in ((1e-9, ["vanishing_gradients"]), (0.0, []), (1e-3, [])):
        job = Job(ranks=1, layers=3)
        job.tell(0, [1.0] * 60, layer_norms=[smallest, 0.1, 1.0] * 60)
        job.settle(1.0)
        assert job.causes() == found
    assert job.run.incidents.newest is None


def test_a_norm_that_fades_is_trouble_only_while_the_loss_has_not_come_down() -> None:
    for loss, found in (([2.0] * 100, ["vanishing_gradients"]), ([2.0 * 0.9**i for i in range(100)], [])):
        job = Job(ranks=1)
        job.train(50)
        job.tell(0, [1e-6] * 100, loss=loss)
        job.settle(1.0)
        assert job.causes() == found


def test_a_loss_that_goes_on_climbing_at_a_calm_norm_diverges_and_one_that_has_found_a_new_level_does_not() -> None:
    def climbing(level: float, growth: float) -> list[str]:
        job = Job(ranks=1)
        job.train(200, loss=[1.0] * 200)
        job.train(200, loss=[level + growth * i for i in range(200)])
        return job.causes()

    assert climbing(1.0, 0.05) == ["loss_divergence"]
    assert climbing(3.0, 0.0) == []
    assert climbing(3.0, -0.005) == []


@pytest.mark.parametrize(("shift", "causes"), [(0, ["replica_drift"]), (1, [])])
def test_weights_are_compared_between_ranks_only_at_the_same_step(shift: int, causes: list[str]) -> None:
    """A rank that observes once more than the others, for its validation, is a record behind from then on."""
    job = Job(ranks=2)
    for rank in (0, 1):
        numbers = [number - shift * rank for number in range(31)]
        prints = [100.0 + number for number in numbers]
        if not shift:
            prints[-1] += rank
        job.tell(rank, [1.0] * 31, local_norm=[1.5 + rank] * 31, step=numbers, parameter_fingerprint=prints)
    job.settle(1.0)
    assert job.causes() == causes


def test_a_failure_of_the_attempt_before_that_is_told_late_alerts_nobody() -> None:
    job = Job(ranks=1)
    job.train(40)
    before, sent = job.name(0), job.sent[0]
    # Its node is cut off, and the job goes on elsewhere.
    job.now += 20.0
    job.start_again()
    job.train(5)
    home = job.runs.find(before)
    assert home is not None
    late = steps(sent + 1, [30.0, 300.0, NAN], instance=before, flags=[RANK_COLUMNS] * 3, loss=[2.0, 2.0, NAN])
    assert not job.run.ingest(home[1], late.steps, job.now), "so few steps need no room"
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    cause = incident.verdict.cause
    assert (cause, incident.attempt) == ("exploding_gradients", 0)
    totals = job.run.totals
    assert (totals.incidents[cause], totals.last_incident[cause]) == (1, 0.0)
    assert totals.counters["build_up"] == 1 and totals.last["build_up"] == 0.0
    assert condition(job.run, job.now, 900.0) == "running"


def test_open_troubles_and_what_led_to_them_survive_a_restart() -> None:
    job = Job(ranks=2, layers=2)
    store = Store(":memory:")
    for rank in (0, 1):
        job.tell(rank, [1.0] * 60, local_norm=[1.0 + rank] * 60, layer_norms=[0.5, 0.5] * 60)
        job.tell(rank, [NAN], loss=[NAN], local_nan_parameters=[1.0])
    job.settle(1.0)
    store.commit(job.runs)
    window = store.incident_window("r", 1)
    assert window is not None
    assert len(window.records) == 2 * (DEFAULT.lead_steps + 1)
    assert window.layer_norms[0].tolist() == [0.5, 0.5]
    before = job.run
    job.runs = store.load(job.now, lambda _: FAST)
    after = job.run
    assert list(after.incidents.kept) == list(before.incidents.kept)
    assert encode(after.newest) == encode(before.newest)
    job.train(DEFAULT.recovered_after)
    assert job.causes(only_open=True) == []
    store.commit(job.runs)
    assert store.incident_window("r", 1) is not None
    store.close()


def test_a_step_that_skip_left_out_is_no_failure_and_the_first_that_it_did_not_is_one() -> None:
    job = Job(ranks=1)
    job.train(60)
    out, made = RANK_COLUMNS | pb.SKIPPED, RANK_COLUMNS
    job.tell(0, [NAN, NAN, NAN], flags=[out] * 3)
    job.train(20)
    assert job.causes() == []
    totals = job.run.totals
    assert (totals.counters["skipped"], totals.nonfinite["gradient nan"]) == (3, 3)
    job.tell(0, [NAN] * 5, flags=[out, out, out, made, made])
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert incident.verdict.first_bad_step == 86


def test_a_scaler_that_leaves_out_a_bad_loss_does_not_hide_it() -> None:
    job = Job(ranks=1)
    job.train(60)
    job.tell(0, [NAN], flags=[RANK_COLUMNS | pb.SKIPPED], loss=[NAN], loss_scale=[1024.0])
    job.settle(1.0)
    assert len(job.causes()) == 1


def test_what_a_dry_run_would_have_done_is_counted_apart() -> None:
    job = Job(ranks=1)
    flags = [RANK_COLUMNS | pb.SHADOW_CLIPPED, RANK_COLUMNS | pb.SHADOW_CLIPPED | pb.SHADOW_SKIPPED, RANK_COLUMNS]
    job.tell(0, [1.0] * 3, flags=flags)
    job.settle(1.0)
    found = job.run.totals.counters
    assert (found["shadow_clipped"], found["shadow_skipped"], found["clipped"], found["skipped"]) == (2, 1, 0, 0)


@pytest.mark.parametrize(("first_step", "build_up"), [(61, True), (0, False), (500, False)])
def test_an_attempt_that_resumes_knows_the_norms_of_the_one_before(first_step: int, build_up: bool) -> None:
    """A restart from another place, or from none, may be another training: it learns its own norms."""
    job = Job(ranks=1)
    job.train(80)
    for _ in range(2):
        # The first launch dies before its first step.
        job.now += 20.0
        job.start_again()
    norms = [1.0, 1.0, 20.0, 40.0]
    job.tell(0, norms, step=[first_step + i for i in range(len(norms))])
    job.settle(5.0)
    resumed = job.run.newest
    assert (resumed.detector.climbing > 0) == build_up
    assert resumed.faults.loss_trend.started == build_up
    assert (resumed.inherited is not None) == build_up
    resumed.faults.loss_trend.losses.append(2.0)
    assert len(job.run.attempts[0].faults.loss_trend.losses) == FIRST_STEPS
