"""The collector's own alerts are those of the rule file: same moments, same words, same inhibitions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.alert import Alert
from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.alerting.routing import GROUP_WAIT_SECONDS, INHIBITIONS, NOTIFIED
from foreshock_collector.alerting.texts import annotations_of, labels_of
from foreshock_collector.catalogue import CATALOGUE, RUN
from foreshock_collector.notify.run_alerts import RunAlerts, duration
from tests.support.repository import ROOT

ADDRESSES = Addresses(collector="http://127.0.0.1:9327")
LABELS = {series.name: series.labels for series in CATALOGUE}
BY_NAME = {alert.name: alert for alert in NOTIFIED}
WINDOW_SECONDS = 60.0
Points = list[tuple[float, float | None]]
"""Time, and a value, or None for a stale marker."""


def points(values: str, interval: float) -> Points:
    """Read promtool's notation: `_x3 0 1+2x4 stale`."""
    found: list[float | str] = []
    for item in values.split():
        missing = re.fullmatch(r"_(?:x(\d+))?", item)
        series = re.fullmatch(r"(-?[\d.e]+)(?:([+-][\d.e]+))?(?:x(\d+))?", item)
        if missing:
            found += ["_"] * int(missing[1] or 1)
        elif series:
            found += [float(series[1]) + float(series[2] or 0) * i for i in range(int(series[3] or 0) + 1)]
        else:
            assert item == "stale", item
            found.append(item)
    return [(i * interval, None if x == "stale" else float(x)) for i, x in enumerate(found) if x != "_"]


def read_series(case: dict[str, Any]) -> list[tuple[str, dict[str, str], Points]]:
    interval = duration(case["interval"])
    found = []
    for each in case["input_series"]:
        name, text = re.fullmatch(r"(\w+)(?:\{(.*)\})?", each["series"]).groups()  # type: ignore[union-attr]
        pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', text or "")
        labels = {label: re.sub(r"\\(.)", r"\1", value) for label, value in pairs}
        if set(RUN) <= labels.keys() and name in LABELS:
            found.append((name, labels, points(str(each["values"]), interval)))
    return found


def facts_at(series: list[tuple[str, dict[str, str], Points]], run: tuple[str, str], now: float) -> Facts | None:
    """The newest samples of the last minute, those that are not stale at the beginning: what the rules look at."""
    newest: list[tuple[bool, str, tuple[str, ...], float]] = []
    for name, labels, line in series:
        if (labels["experiment"], labels["run"]) != run:
            continue
        seen = [(at, value) for at, value in line if now - WINDOW_SECONDS <= at <= now]
        values = [value for _, value in seen if value is not None]
        if values:
            key = tuple(labels.get(label, "") for label in LABELS[name][len(RUN) :])
            newest.append((seen[-1][1] is None, name, key, values[-1]))
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for _, name, key, value in sorted(newest, key=lambda each: each[0]):
        samples.setdefault(name, {}).setdefault(key, value)
    return Facts(experiment=run[0], run=run[1], now=now, samples=samples) if samples else None


def cases() -> Iterator[Any]:
    for path in sorted((ROOT / "tests/deploy/promtool").glob("*.test.yml")):
        for case in yaml.safe_load(path.read_text())["tests"]:
            checks = [check for check in case.get("alert_rule_test", ()) if check["alertname"] in BY_NAME]
            if checks:
                yield pytest.param(case, checks, id=f"{path.name.split('.')[0]}: {case['name']}")


@pytest.mark.parametrize(("case", "checks"), tuple(cases()))
def test_an_alert_fires_when_prometheus_has_it_fire_and_says_the_same(
    case: dict[str, Any], checks: list[dict[str, Any]]
) -> None:
    series, interval = read_series(case), duration(case["interval"])
    runs = {(labels["experiment"], labels["run"]) for _, labels, _ in series}
    alerts = {run: RunAlerts(ADDRESSES) for run in runs}
    now = -interval
    for check in sorted(checks, key=lambda check: seconds(check["eval_time"])):
        while now + interval <= seconds(check["eval_time"]):
            now += interval
            for run in runs:
                alerts[run].update(facts_at(series, run, now), now, now)
        name = check["alertname"]
        firing = {run for run in runs if name in alerts[run].firing}
        expected = {
            (each["exp_labels"]["experiment"], each["exp_labels"]["run"]): each for each in check.get("exp_alerts", ())
        }
        assert firing == expected.keys(), (name, check["eval_time"])
        for run, each in expected.items():
            facts = facts_at(series, run, now)
            value = None if facts is None else BY_NAME[name].condition.value(facts)  # type: ignore[misc]
            if facts is not None and value is not None:
                assert labels_of(BY_NAME[name], facts) == {"alertname": name, **each["exp_labels"]}
                wanted = {key: str(text) for key, text in each["exp_annotations"].items() if key != "dashboard_url"}
                assert annotations_of(BY_NAME[name], facts, value, ADDRESSES) == wanted


def seconds(text: str) -> float:
    return sum(duration(part) for part in re.findall(r"\d+[smh]", str(text)))


def test_the_oracle_covers_every_alert_that_notifies() -> None:
    fired = {check["alertname"] for each in cases() for check in each.values[1] if check.get("exp_alerts")}
    assert fired == BY_NAME.keys()


def test_waits_and_inhibitions_are_those_of_the_alertmanager_example() -> None:
    example = yaml.safe_load((ROOT / "deploy/alertmanager/alertmanager.yml").read_text())
    waits = {route["matchers"][0].split('"')[1]: route.get("group_wait") for route in example["route"]["routes"]}
    assert {severity: duration(wait) for severity, wait in waits.items() if wait} == GROUP_WAIT_SECONDS

    def names(matchers: list[str]) -> tuple[str, ...]:
        return tuple(sorted(re.findall(r"Foreshock\w+", matchers[0])))

    of_runs = {
        (names(rule["source_matchers"]), names(rule["target_matchers"]))
        for rule in example["inhibit_rules"]
        if rule.get("equal") == ["experiment", "run"]
    }
    assert of_runs == {(tuple(sorted(each.sources)), tuple(sorted(each.targets))) for each in INHIBITIONS}


def test_alerts_that_need_prometheus_are_those_with_a_history_or_without_a_run() -> None:
    notifying = {alert.name for alert in ALERTS if alert.severity in GROUP_WAIT_SECONDS}
    assert notifying - BY_NAME.keys() == {
        *("ForeshockStepsSkipped", "ForeshockRecordsDropped", "ForeshockRecorderRefused", "ForeshockCollectorErrors"),
        *("ForeshockCollectorDown", "ForeshockCommitsFailing", "ForeshockIngestLagging"),
    }
    lookups = [part for alert in NOTIFIED for part in (*alert.description, *alert.values.values())]
    assert all(isinstance(part, str) or part.render is not None for part in lookups)


class Timeline:
    """Series of one run, and the alerts on it, second by second."""

    def __init__(self, run: str = "r") -> None:
        self.alerts, self.now, self.run = RunAlerts(ADDRESSES), 10_000.0, run
        self.samples: dict[str, dict[tuple[str, ...], float]] = {}

    def after(self, seconds: float = 0.0, **samples: Mapping[tuple[str, ...], float] | float) -> list[tuple[str, bool]]:
        """Set samples, let time pass, and return what is notified: the alert's name, and whether it fires."""
        self.now += seconds
        for name, found in samples.items():
            self.samples[f"foreshock_{name}"] = dict(found) if isinstance(found, Mapping) else {(): found}
        facts = Facts(experiment="e", run=self.run, now=self.now, samples=self.samples)
        found_now = self.alerts.update(facts, self.now, self.now)
        return [
            (each.labels["alertname"].removeprefix("Foreshock"), each.resolved_seconds is None) for each in found_now
        ]


def test_a_warning_waits_for_a_worse_alert_and_gives_way_to_it() -> None:
    line = Timeline()
    assert line.after(last_build_up_timestamp_seconds=10_000.0) == []
    assert line.after(5, last_incident_timestamp_seconds={("exploding_gradients",): 10_005.0}) == [
        ("ExplodingGradients", True)
    ]
    assert line.after(60) == []


def test_a_build_up_alone_is_notified_once_and_resolved() -> None:
    line = Timeline()
    assert line.after(last_build_up_timestamp_seconds=10_000.0) == []
    assert line.after(9) == []
    assert line.after(1) == [("GradientBuildUp", True)]
    assert line.after(200) == []
    assert line.after(85) == []
    assert line.after(5) == []  # the event is five minutes old; it keeps firing for as long again after it last held
    assert line.after(289) == []
    assert line.after(6) == [("GradientBuildUp", False)]
    assert line.alerts.quiet


def test_what_was_notified_is_resolved_also_where_the_run_is_gone() -> None:
    line = Timeline()
    line.after(open_incidents={("loss_divergence",): 1.0})
    assert line.after(10) == [("TrainingFault", True)]
    assert line.alerts.update(None, line.now + 299, line.now + 299) == []
    (resolved,) = line.alerts.update(None, line.now + 300, line.now + 300)
    assert (resolved.labels["run"], resolved.started_seconds, resolved.resolved_seconds) == (
        "r",
        10_000.0,
        line.now + 300,
    )


def test_a_name_that_looks_like_a_template_is_only_a_name() -> None:
    line = Timeline(run="{{ $labels.experiment }}/ü")
    line.after(last_incident_timestamp_seconds={("exploding_gradients",): 10_000.0})
    line.samples["foreshock_last_incident_timestamp_seconds"] = {}
    facts = Facts(experiment="e", run=line.run, now=10_000.0, samples=line.samples)
    text = annotations_of(BY_NAME["ForeshockExplodingGradients"], facts, 0.0, ADDRESSES)
    assert text["description"].startswith("Run {{ $labels.experiment }}/ü of e has exploded. Go back")
    assert text["page_url"] == "http://127.0.0.1:9327/run/%7B%7B%20%24labels.experiment%20%7D%7D%2F%C3%BC"
    assert text["verdict"] == text["layer"] == "unknown"


def test_an_alert_of_every_kind_has_a_value_only_where_its_series_are() -> None:
    empty = Facts(experiment="e", run="r", now=10_000.0, samples={})

    def value(alert: Alert) -> float | None:
        assert alert.condition.value is not None
        return alert.condition.value(empty)

    assert {value(alert) for alert in NOTIFIED} == {None}
