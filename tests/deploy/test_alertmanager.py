"""The Alertmanager example: who is told of what, and what is left out because something worse is told of."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.alerting import (
    ALERTMANAGER_CONFIG,
    PROMETHEUS_CONFIG,
    SEVERITY,
    Start,
    Webhook,
    name_and_run,
    request,
    seconds,
    start_alertmanager,
    with_receiver,
)
from tests.support.yaml_text import parsed

pytestmark = pytest.mark.integration

EXPLODED = [
    ("ForeshockExplodingGradients", "exploded"),
    ("ForeshockGradientSpike", "exploded"),
    ("ForeshockGradientBuildUp", "exploded"),
    ("ForeshockLossSpike", "exploded"),
    ("ForeshockStepsSkipped", "exploded"),
]
SUDDEN = [
    ("ForeshockSuddenNonFinite", "sudden"),
    ("ForeshockGradientBuildUp", "sudden"),
    ("ForeshockRanksMissing", "sudden"),
]
BUILDING = [("ForeshockGradientBuildUp", "building"), ("ForeshockGradientSpike", "building")]
DIED = [
    ("ForeshockRunDied", "died"),
    ("ForeshockRankSilent", "died"),
    ("ForeshockRanksMissing", "died"),
    ("ForeshockRunStalled", "died"),
    ("ForeshockTrainingFault", "died"),
]
DOWN = [
    ("ForeshockCollectorDown", ""),
    ("ForeshockRankSilent", "building"),
    ("ForeshockRanksMissing", "building"),
    ("ForeshockRunStalled", "building"),
]
FULL = [("ForeshockCommitsFailing", ""), ("ForeshockIngestLagging", "")]
ALL = EXPLODED + SUDDEN + DIED + BUILDING + DOWN + FULL
TOLD_OF = {
    ("ForeshockExplodingGradients", "exploded"),
    ("ForeshockStepsSkipped", "exploded"),
    ("ForeshockSuddenNonFinite", "sudden"),
    ("ForeshockRunDied", "died"),
    ("ForeshockTrainingFault", "died"),
    ("ForeshockGradientBuildUp", "building"),
    ("ForeshockCollectorDown", ""),
    ("ForeshockCommitsFailing", ""),
}
INHIBITED = set(ALL) - TOLD_OF - {("ForeshockGradientSpike", "building")}


def amtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["amtool", *arguments], capture_output=True, text=True, timeout=60, check=False)


def alert_of(name: str, run: str) -> dict[str, Any]:
    labels = {"alertname": name, "severity": SEVERITY[name]} | ({"experiment": "e", "run": run} if run else {})
    return {"labels": labels, "annotations": {"summary": name}}


def test_amtool_accepts_the_example() -> None:
    done = amtool("check-config", ALERTMANAGER_CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "severity"), SEVERITY.items(), ids=lambda value: value)
def test_critical_and_warning_are_told_and_info_is_only_kept(name: str, severity: str) -> None:
    receiver = "nobody" if severity == "info" else "webhook"
    labels = (f"alertname={name}", f"severity={severity}", "experiment=e", "run=r")
    done = amtool(
        "config", "routes", "test", f"--config.file={ALERTMANAGER_CONFIG}", f"--verify.receivers={receiver}", *labels
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert receiver in done.stdout


def test_an_early_sign_waits_for_more_than_one_evaluation_and_damage_waits_for_nothing() -> None:
    evaluation = seconds(parsed(PROMETHEUS_CONFIG.read_text())["global"]["evaluation_interval"])
    waits = {
        route["matchers"][0].split('"')[1]: seconds(route["group_wait"])
        for route in parsed(ALERTMANAGER_CONFIG.read_text())["route"]["routes"]
        if "group_wait" in route
    }
    assert waits["critical"] == 0
    assert waits["warning"] > evaluation


def test_only_the_worst_is_told(webhook: Webhook, start: Start, tmp_path: Path) -> None:
    address = start_alertmanager(start, with_receiver(webhook.url, tmp_path), tmp_path)
    request(address, "POST", "/api/v2/alerts", [alert_of(*each) for each in ALL])

    told = [webhook.next() for _ in TOLD_OF]
    assert {name_and_run(alert) for alert in told} == {("firing", *each) for each in TOLD_OF}
    critical = sum(severity == "critical" for severity in SEVERITY.values())
    assert {alert["labels"]["severity"] for alert in told[:critical]} == {"critical"}

    # Every group has been flushed or is held by Alertmanager itself, which names what holds it.
    held = {
        (alert["labels"]["alertname"], alert["labels"].get("run", ""))
        for alert in request(address, "GET", "/api/v2/alerts")
        if alert["status"]["inhibitedBy"]
    }
    assert held == INHIBITED
    assert webhook.alerts.empty()


def test_without_the_inhibitions_everything_but_info_is_told(webhook: Webhook, start: Start, tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    address = start_alertmanager(start, with_receiver(webhook.url, tmp_path, inhibit=False), tmp_path)
    request(address, "POST", "/api/v2/alerts", [alert_of(*each) for each in ALL])
    expected = {("firing", *each) for each in ALL if SEVERITY[each[0]] != "info"}
    assert {name_and_run(webhook.next()) for _ in expected} == expected
