"""From a DDP script, through ring, recorder and collector, to what people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_collector.catalogue import COLUMN_GAUGES
from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import Job, said
from tests.support.waiting import eventually


def test_an_explosion_is_called_one_and_its_lead_is_counted_in_steps(collector: Collector, job: Job) -> None:
    assert "rank 0 done" in said(job("boom", collector.address, steps=150, explode_at=40))
    run = left(collector, "boom")
    assert run["counters"]["steps"] == 150
    (incident,) = run["incidents"]
    verdict = incident["verdict"]
    assert verdict["cause"] == "exploding_gradients"
    assert verdict["lead_steps"] == verdict["first_bad_step"] - verdict["onset_step"] > 0
    build_up = next(event["step"] for event in run["events"] if event["kind"] == "build_up")
    assert build_up < verdict["first_bad_step"]
    assert verdict["layer"] in run["model"]["layers"]


@pytest.mark.parametrize(("step", "steps", "cause"), [(0, 30, "first_step_nonfinite"), (200, 220, "sudden_nonfinite")])
def test_a_nan_in_one_ranks_batch_is_no_explosion_and_names_the_rank(
    collector: Collector, job: Job, step: int, steps: int, cause: str
) -> None:
    assert "rank 1 done" in said(job("bad", collector.address, steps=steps, nan_at=step, nan_rank=1))
    (incident,) = left(collector, "bad")["incidents"]
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == (cause, 1)
    assert incident["verdict"]["first_bad_step"] == step


def test_a_healthy_run_is_left_alone_and_counted_to_the_last_step_and_leaves_nothing(
    collector: Collector, job: Job, tmp_path: Path
) -> None:
    said(job("fine", collector.address, steps=500))
    run = left(collector, "fine")
    assert run["counters"]["steps"] == 500
    assert run["incidents"] == []
    assert run["counters"]["build_up"] == 0
    steps = collector.get("/api/v1/runs/fine/steps")
    assert steps["step"] == list(range(500))
    eventually(lambda: not list((tmp_path / "rings").iterdir()), "a recorder that takes all it made along")


def test_every_column_that_has_a_gauge_is_measured_by_the_probe_and_seen_on_metrics(
    collector: Collector, job: Job
) -> None:
    said(job("gauges", collector.address, steps=3, optimizer="Adam"))
    left(collector, "gauges")
    exported = {line.partition("{")[0] for line in collector.metrics().splitlines() if 'run="gauges"' in line}
    assert {series.name for series in COLUMN_GAUGES.values()} <= exported


def test_a_resumed_run_shows_its_own_steps_and_a_requeue_is_a_new_attempt(collector: Collector, job: Job) -> None:
    said(job("again", collector.address, steps=20))
    left(collector, "again")
    said(job("again", collector.address, steps=20, start=12000))
    run = eventually(lambda: (seen := collector.run("again"))["counters"]["steps"] == 40 and seen, "both attempts")
    assert (run["attempt"], run["newest"]["step"]) == (1, 12019)
    assert collector.get("/api/v1/runs/again/steps?attempt=0")["step"] == list(range(20))
    assert collector.get("/api/v1/runs/again/steps?attempt=1")["step"] == list(range(12000, 12020))


def test_a_killed_ranks_last_record_arrives(collector: Collector, job: Job) -> None:
    said(job("killed", collector.address, steps=60, kill_at=30, who=[0]))
    run = left(collector, "killed")
    assert run["ranks"][0]["state"] == "lost"
    assert run["ranks"][0]["last_step"] == 30


def test_a_killed_collector_loses_nothing_it_acknowledged(collector: Collector, job: Job) -> None:
    process = job("crash", collector.address, steps=150, pace=0.02)
    eventually(lambda: "crash" in collector.names() and collector.run("crash")["counters"]["steps"] > 20, "steps")
    before = collector.run("crash")["counters"]["steps"]
    collector.kill_and_restart()
    assert collector.run("crash")["counters"]["steps"] >= before
    said(process)
    run = left(collector, "crash")
    assert run["counters"]["steps"] == 150
    assert collector.get("/api/v1/runs/crash/steps")["step"] == list(range(150))


def test_training_goes_on_without_a_collector_and_says_so_once(job: Job) -> None:
    text = said(job("alone", "127.0.0.1:9", steps=30))
    assert "rank 0 done" in text
    assert text.count("accepts no records") == 1


def test_an_exception_in_the_script_is_told(collector: Collector, job: Job) -> None:
    said(job("raised", collector.address, steps=30, raise_at=10))
    run = left(collector, "raised")
    assert {rank["state"] for rank in run["ranks"]} <= {"exception", "lost"}
    assert run["counters"]["steps"] == 11


def test_ranks_that_do_not_attach_are_named(tmp_path: Path, job: Job) -> None:
    environment = {"FORESHOCK_ATTACH_TIMEOUT": "2"}
    text = said(job("half", "127.0.0.1:9", attach_ranks=[0], environment=environment))
    assert "AttachError: rank 1 did not call foreshock.attach within 2 s" in text


def test_a_kill_switch_disables_every_rank(job: Job) -> None:
    text = said(job("off", "127.0.0.1:9", environment={"FORESHOCK_DISABLED": "1"}))
    # The first rank that is disabled waits for nobody, so it may know of itself alone.
    assert "not watching: FORESHOCK_DISABLED is set on rank" in text
    assert "rank 1 done" in text
