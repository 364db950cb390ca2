"""The committed dashboards and rules: up to date, and free of what Grafana would accept in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.catalogue import CATALOGUE
from grafana.make import HERE, dashboards, main, rules
from grafana.rules import present
from tests.grafana import linting
from tests.grafana.linting import CHECKS, RULES, Dashboard
from tests.support.alerting import ALERTS

DASHBOARDS: dict[str, Dashboard] = {p.stem: json.loads(p.read_text()) for p in (HERE / "dashboards").glob("*.json")}


def test_the_committed_files_are_what_their_sources_say(capsys: pytest.CaptureFixture[str]) -> None:
    made = dashboards() | rules(Addresses())
    assert {path: path.read_text() for path in made} == made
    assert main(["--check"]) == 0
    assert main(["rules", "--check", "--grafana-url", "https://grafana.example.org"]) == 1
    assert "foreshock.rules.yml is out of date; run: make dashboards rules" in capsys.readouterr().err


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_a_dashboard_is_sound(name: str, check: Callable[[Dashboard], list[str]]) -> None:
    assert check(DASHBOARDS[name]) == []


def test_links_lead_to_dashboards_that_there_are() -> None:
    uids = {dashboard["uid"] for dashboard in DASHBOARDS.values()}
    assert len(uids) == len(DASHBOARDS) == 5
    assert [linting.dead_links(dashboard, uids) for dashboard in DASHBOARDS.values()] == [[]] * len(DASHBOARDS)
    assert {rule["dashboardUid"] for rule in RULES} <= uids


def test_every_series_is_shown_somewhere() -> None:
    shown = "".join(json.dumps(dashboard) for dashboard in DASHBOARDS.values())
    # Facts in labels and a limit of a rule: not for a chart.
    hidden = {
        "foreshock_incidents_total",
        "foreshock_last_build_up_step",
        "foreshock_last_loss_spike_step",
        "foreshock_last_loss_spike_timestamp_seconds",
        "foreshock_last_nonfinite_timestamp_seconds",
        "foreshock_last_spike_step",
        "foreshock_last_spike_timestamp_seconds",
        "foreshock_stall_threshold_seconds",
        "process_virtual_memory_bytes",
    }
    assert {series.name for series in CATALOGUE if series.name not in shown} == hidden


def broken(change: Callable[[list[dict[str, Any]]], None]) -> Dashboard:
    dashboard = copy.deepcopy(DASHBOARDS["run"])
    change([panel for panel in dashboard["panels"] if "targets" in panel])
    return dashboard


def asking(expr: str) -> Dashboard:
    return broken(lambda panels: panels[0]["targets"][0].update(expr=expr))


@pytest.mark.parametrize(
    ("check", "dashboard"),
    [
        (linting.duplicate_ids, broken(lambda panels: panels[1].update(id=panels[0]["id"]))),
        (linting.overlaps, broken(lambda panels: panels[1]["gridPos"].update(x=panels[0]["gridPos"]["x"]))),
        (linting.overlaps, broken(lambda panels: panels[-1]["gridPos"].update(x=20))),
        (linting.unexplained, broken(lambda panels: panels[0].update(description=""))),
        (linting.unexplained, broken(lambda panels: panels[0]["fieldConfig"]["defaults"].pop("unit"))),
        (linting.fixed_datasources, broken(lambda panels: panels[0].update(datasource={"uid": "mine"}))),
        (linting.foreign_names, asking("foreshock_no_such_series")),
        (linting.foreign_names, asking('foreshock_step{rank="0"}')),
        (linting.foreign_names, asking("sum by (job) (foreshock_step)")),
        (linting.foreign_names, asking("rate(foreshock_step")),
        (linting.bare_counters, asking("sum(foreshock_steps_total)")),
    ],
)
def test_each_check_can_fail(check: Callable[[Dashboard], list[str]], dashboard: Dashboard) -> None:
    assert check(dashboard) != []


def test_a_dead_link_is_noticed() -> None:
    assert linting.dead_links(DASHBOARDS["fleet"], {"foreshock-fleet"}) != []


def test_every_alert_has_a_rule_of_grafanas_and_keeps_what_it_says() -> None:
    assert [rule["title"] for rule in RULES] == [alert["alert"] for alert in ALERTS]
    assert len({rule["uid"] for rule in RULES}) == len(RULES)
    for rule, alert in zip(RULES, ALERTS, strict=True):
        assert rule["labels"] == alert["labels"]
        assert rule["for"] == alert.get("for", "0s")
        assert rule["data"][0]["model"]["expr"] == present(alert["expr"])
        assert rule["annotations"]["runbook_url"] == alert["annotations"]["runbook_url"]
        assert "query" not in rule["annotations"]["description"]
        assert rule["annotations"]["description"].count("{{") == rule["annotations"]["description"].count("}}")
