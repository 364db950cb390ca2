"""From a training job to a person: torchrun, recorder, collector, Prometheus, Alertmanager, a webhook."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

import pytest

from grafana.dashboards import DASHBOARDS
from tests.support.alerted_collector import Watch
from tests.support.collector_process import left
from tests.support.launched_jobs import Job, said
from tests.support.waiting import eventually


def test_a_paced_build_up_is_told_of_before_the_nan_step_is_taken(watch: Watch, job: Job) -> None:
    process = job("paced", watch.collector.address, steps=110, explode_at=40, pace=0.5, pace_from=40)
    first = eventually(lambda: watch.told("paced"), "a warning")[0]
    heard = time.time()
    assert first["labels"]["alertname"] == "ForeshockGradientBuildUp"
    said(process)
    run = left(watch.collector, "paced")
    (incident,) = run["incidents"]
    steps = watch.collector.get("/api/v1/runs/paced/steps")
    taken = steps["wall_seconds"][steps["step"].index(incident["verdict"]["first_bad_step"])]
    assert heard < taken
    explosion = eventually(lambda: watch.told("paced")[1:], "the page")[0]
    assert explosion["labels"]["alertname"] == "ForeshockExplodingGradients"


def test_at_full_speed_the_explosion_is_told_of_once_and_its_build_up_inhibited(watch: Watch, job: Job) -> None:
    said(job("fast", watch.collector.address, steps=150, explode_at=40))
    (incident,) = left(watch.collector, "fast")["incidents"]
    eventually(lambda: watch.alerts("fast").get("ForeshockExplodingGradients") == "active", "the alert")
    eventually(lambda: watch.alerts("fast").get("ForeshockGradientBuildUp") == "suppressed", "its build-up, inhibited")
    told: list[dict[str, Any]] = eventually(lambda: watch.told("fast"), "the webhook")
    assert [alert["labels"]["alertname"] for alert in told] == ["ForeshockExplodingGradients"]
    assert incident["verdict"]["lead_steps"] > 0
    assert f"{incident['verdict']['lead_steps']} steps after the first sign" in told[0]["annotations"]["description"]
    follow(told[0], watch, incident["verdict"])


def follow(alert: dict[str, Any], watch: Watch, verdict: dict[str, Any]) -> None:
    """From an alert as the webhook got it to what its links show: the same run, step and verdict."""
    said, run = alert["annotations"], alert["labels"]["run"]
    page, runbook, dashboard = (urlsplit(said[name]) for name in ("page_url", "runbook_url", "dashboard_url"))
    assert unquote(page.path) == f"/run/{run}"
    shown = watch.collector.get(f"/api/v1/runs/{page.path.removeprefix('/run/')}")
    assert (shown["run"], shown["incidents"][-1]["verdict"]) == (run, verdict)
    assert f"First non-finite step {verdict['first_bad_step']}" in said["description"]
    for path, wanted in ((page.path, "<html"), (runbook.path, alert["labels"]["alertname"])):
        request = Request(watch.collector.url + path, headers={"Accept": "text/html"})
        with urlopen(request, timeout=30) as response:
            assert wanted in response.read().decode()
    built = {buffer["uid"]: buffer for buffer in (build() for build in DASHBOARDS.values())}
    variables = {variable["name"] for variable in built[dashboard.path.rpartition("/")[2]]["templating"]["list"]}
    assert parse_qs(dashboard.query) == {"var-run": [run]}
    assert "run" in variables


@pytest.mark.parametrize(("run", "step", "steps"), [("first", 0, 30), ("quiet", 200, 220)])
def test_a_nan_out_of_nothing_is_told_of_as_that_alone(watch: Watch, job: Job, run: str, step: int, steps: int) -> None:
    said(job(run, watch.collector.address, steps=steps, nan_at=step, nan_rank=1))
    left(watch.collector, run)
    (told,) = eventually(lambda: watch.told(run), "the webhook")
    assert told["labels"]["alertname"] == "ForeshockSuddenNonFinite"
    assert f"First non-finite step {step}" in told["annotations"]["description"]
    assert "Worst rank 1" in told["annotations"]["description"]
    eventually(lambda: watch.scraped(run, steps), "a scrape after the end")
    assert watch.alerts(run) == {"ForeshockSuddenNonFinite": "active"}


def test_of_a_healthy_run_nobody_is_told(watch: Watch, job: Job) -> None:
    said(job("healthy", watch.collector.address, steps=500))
    left(watch.collector, "healthy")
    eventually(lambda: watch.scraped("healthy", 500), "a scrape after the end")
    assert watch.alerts("healthy") == {}
    assert watch.told("healthy") == []
