"""From messages to alerts: a collector is driven into each verdict, and the shipped rules judge what it exports."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE, Cause
from foreshock_collector.analysis.verdicts import make_verdict
from foreshock_collector.state.condition import condition
from foreshock_collector.state.incidents import FAILURE
from foreshock_collector.web.answers import verdict_answer
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.deploy.watched import MEASURED, SILENT_SECONDS, Watched, alerts_of

pytestmark = pytest.mark.integration

NAN, INF = math.nan, math.inf
Scenario = Callable[[], Watched]


def trained(*, ranks: int = 2, layers: int = 0, steps: int = 60) -> Watched:
    job = Watched(ranks=ranks, layers=layers)
    job.wait(60.0)
    if steps:
        job.train(steps)
    job.wait(15.0)
    return job


def told(job: Watched, norms: list[float], **columns: list[float]) -> Watched:
    """The same of every rank, and ten seconds for the alerts."""
    for rank in job.run.newest.instances:
        job.tell(rank, norms, **columns)
    job.wait(30.0)
    return job


def healthy() -> Watched:
    job = trained()
    job.go_on(300.0)
    return job


def exploding() -> Watched:
    return told(trained(), [3.0, 10.0, 40.0, 200.0, 1e4, NAN])


def not_finite_from_the_start() -> Watched:
    return told(trained(steps=0), [NAN], loss=[NAN])


def loss_not_finite() -> Watched:
    return told(trained(), [NAN], loss=[NAN], local_nan_parameters=[1.0])


def gradient_not_finite() -> Watched:
    return told(trained(), [NAN], local_nan_parameters=[1.0])


def one_rank_not_finite() -> Watched:
    job = trained()
    job.tell(0, [NAN])
    job.tell(1, [NAN], local_nan_parameters=[1.0])
    job.wait(30.0)
    return job


def overflow_of_a_scaler() -> Watched:
    job = told(trained(), [INF], loss_scale=[1024.0], flags=[MEASURED | pb.SKIPPED])
    job.go_on(60.0)
    return job


def scale_collapsed() -> Watched:
    return told(trained(), [INF] * 12, loss_scale=[2.0**-i for i in range(12)], flags=[MEASURED | pb.SKIPPED] * 12)


def climbing_loss() -> Watched:
    return told(trained(ranks=1, steps=0), [1.0] * 400, loss=[*[1.0] * 200, *[1.0 + 0.05 * i for i in range(200)]])


def climbing_loss_until_nan() -> Watched:
    losses = [*[1.0] * 200, *[1.0 + 0.05 * i for i in range(200)], NAN]
    return told(trained(ranks=1, steps=0), [*[1.0] * 400, NAN], loss=losses)


def vanishing() -> Watched:
    job = trained(ranks=1, layers=3, steps=0)
    job.tell(0, [1.0] * 60, layer_norms=[1e-9, 0.1, 1.0] * 60)
    job.wait(30.0)
    return job


def same_data() -> Watched:
    job = trained()
    job.train(60, alike=True)
    job.wait(30.0)
    return job


def drifting() -> Watched:
    job = trained(ranks=3)
    for rank in range(3):
        prints = [7.0 if rank == 1 else 5.0]
        job.tell(rank, [1.0], local_norm=[1.5 + 0.1 * rank], parameter_fingerprint=prints)
    job.wait(30.0)
    return job


def outlying() -> Watched:
    job = trained(ranks=3)
    for rank in range(3):
        job.tell(rank, [1.0] * 60, local_norm=[50.0 if rank == 1 else 1.0 + 0.1 * rank] * 60)
    job.wait(30.0)
    return job


def hanging() -> Watched:
    job = trained()
    job.compute(0, 61)
    job.compute(1, 60)
    job.wait(150.0)
    return job


def without_loss() -> Watched:
    """The script has stopped to observe it."""
    return told(trained(), [1.0] * 40, flags=[0] * 40)


def killed() -> Watched:
    job = trained()
    job.vanish(1)
    job.leave(0, pb.ExitReason.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    job.wait(30.0)
    return job


def out_of_memory() -> Watched:
    job = trained()
    for rank in (0, 1):
        job.leave(rank, pb.ExitReason.EXCEPTION, 'OutOfMemoryError: CUDA out of memory. Tried "2 GiB"\nSee docs')
    job.wait(30.0)
    return job


def judged_unknown() -> Watched:
    """Of a live run every step is known, so only a log has it: taken here as if a run had."""
    job = trained()
    verdict = make_verdict("unknown", attempt=0, step=60, evidence=())
    job.run.incidents.open(job.run.newest, FAILURE, verdict, 61, job.now)
    job.run.newest.detector.failing = True
    job.wait(30.0)
    return job


EARLY = {"ForeshockGradientSpike", "ForeshockGradientBuildUp"}
VERDICTS: dict[Cause, tuple[Scenario, set[str]]] = {
    "healthy": (healthy, set()),
    "exploding_gradients": (exploding, EARLY),
    "first_step_nonfinite": (not_finite_from_the_start, set()),
    "sudden_nonfinite": (loss_not_finite, set()),
    "nonfinite_gradient": (gradient_not_finite, set()),
    "nonfinite_divergence": (climbing_loss_until_nan, {"ForeshockLossSpike", "ForeshockTrainingFault"}),
    "bad_rank": (one_rank_not_finite, set()),
    "amp_overflow": (overflow_of_a_scaler, set()),
    "amp_scale_collapse": (scale_collapsed, set()),
    "loss_divergence": (climbing_loss, {"ForeshockLossSpike"}),
    "missing_loss": (without_loss, set()),
    "vanishing_gradients": (vanishing, set()),
    "duplicate_data": (same_data, set()),
    "replica_drift": (drifting, set()),
    "outlier_rank": (outlying, set()),
    "stalled": (hanging, set()),
    "rank_lost": (killed, set()),
    "crashed": (out_of_memory, set()),
    "unknown": (judged_unknown, set()),
}
"""How to come by each, and what else is told of such a run: early signs, and the fault that led there."""


def ended(reason: pb.ExitReason, detail: str = "") -> Watched:
    job = trained()
    for rank in (0, 1):
        job.leave(rank, reason, detail)
    job.wait(180.0)
    return job


def guarded() -> Watched:
    """The script itself ends at a NaN."""
    job = trained()
    for rank in (0, 1):
        job.tell(rank, [NAN], loss=[NAN])
        job.leave(rank, pb.ExitReason.EXCEPTION, "exit code 1")
    job.wait(180.0)
    return job


def crashed_within_a_second() -> Watched:
    """And seen long after."""
    job = out_of_memory()
    job.wait(600.0)
    return job


def hung_after_a_death() -> Watched:
    """One rank is gone, its recorder said so, and the others wait for it."""
    job = trained()
    job.vanish(1)
    job.wait(60.0)
    return job


def restarted() -> Watched:
    job = out_of_memory()
    job.start()
    job.wait(60.0)
    job.go_on(180.0)
    return job


def restarted_without_a_step() -> Watched:
    job = out_of_memory()
    job.start()
    job.wait(60.0)
    return job


def unheard_for_a_while() -> Watched:
    job = trained()
    job.silence()
    job.wait(300.0)
    return job


def unheard_for_good() -> Watched:
    job = trained()
    job.silence()
    job.wait(SILENT_SECONDS + 180.0)
    return job


OTHERS: dict[str, tuple[Scenario, set[str]]] = {
    "finished": (lambda: ended(pb.ExitReason.FINISHED), set()),
    "detached": (lambda: ended(pb.ExitReason.DETACHED), set()),
    "interrupted": (lambda: ended(pb.ExitReason.INTERRUPTED, "SIGTERM"), set()),
    "ends by its own guard": (guarded, {"ForeshockSuddenNonFinite"}),
    "crashed within a second": (crashed_within_a_second, {"ForeshockRunDied"}),
    "hung after a death": (hung_after_a_death, {"ForeshockRunDied"}),
    "restarted and going on": (restarted, set()),
    "restarted without a step": (restarted_without_a_step, {"ForeshockRunDied"}),
    "not heard of for five minutes": (unheard_for_a_while, {"ForeshockRankSilent"}),
    "not heard of any more": (unheard_for_good, {"ForeshockRunDied"}),
}


@pytest.fixture(scope="module")
def jobs() -> dict[str, Watched]:
    made = {name: scenario() for name, (scenario, _) in OTHERS.items()}
    return made | {cause: scenario() for cause, (scenario, _) in VERDICTS.items()}


@pytest.fixture(scope="module")
def fired(jobs: dict[str, Watched], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return alerts_of(jobs, tmp_path_factory.mktemp("scenarios"))


def test_every_verdict_is_tried() -> None:
    assert VERDICTS.keys() == VERDICT_TABLE.keys()


@pytest.mark.parametrize("cause", VERDICTS)
def test_a_verdict_leads_to_its_alert_and_to_no_other(
    cause: Cause, jobs: dict[str, Watched], fired: dict[str, dict[str, str]]
) -> None:
    expected, run = VERDICT_TABLE[cause].outcome, jobs[cause].run
    newest = run.incidents.newest
    assert (newest.verdict.cause if newest else "healthy") == (cause if expected.alert else "healthy")
    assert fired[cause].keys() == VERDICTS[cause][1] | ({expected.alert} if expected.alert else set())
    assert condition(run, jobs[cause].now, SILENT_SECONDS) == expected.condition
    if newest is not None:
        assert verdict_answer(newest.verdict)["runbook"] == expected.alert
        said = fired[cause][expected.alert]
        assert newest.verdict.summary in said or cause == "exploding_gradients"
        assert ("no longer finite" in said) == (not expected.finite and cause != "exploding_gradients")
        assert str(newest.verdict.first_bad_step) in said


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_ends_is_told_of_once_or_not_at_all(name: str, fired: dict[str, dict[str, str]]) -> None:
    assert fired[name].keys() == OTHERS[name][1]


def test_an_alert_names_the_rank_and_what_it_died_of(fired: dict[str, dict[str, str]]) -> None:
    assert (
        '2 ranks died after step 59, rank 0 first: OutOfMemoryError: CUDA out of memory. Tried "2 GiB"'
        in (fired["crashed"]["ForeshockRunDied"])
    )
    assert "Rank 1 was lost after step 59" in fired["rank_lost"]["ForeshockRunDied"]
    assert "rank 1 has not arrived" in fired["stalled"]["ForeshockRunStalled"]
    assert "2 of 2 ranks fell silent after step 59" in fired["not heard of any more"]["ForeshockRunDied"]
