"""The alert rules: what promtool says of them, and that they name nothing that the collector does not export."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import promql_parser as promql
import pytest

from foreshock_collector.alerting import alerts
from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.rule_file import rule_file
from foreshock_collector.analysis.verdict_table import VERDICT_TABLE, Cause
from foreshock_collector.catalogue import (
    CATALOGUE,
    COLLECTOR_STAGES,
    DROP_REASONS,
    REFUSAL_REASONS,
    RUN_STAGES,
    VERDICTS,
    Kind,
)
from foreshock_protos import DEFAULT_HTTP_PORT
from tests.deploy.firing import judged, promtool
from tests.support.alerting import ALERTS, PROMETHEUS_CONFIG, SEVERITY
from tests.support.repository import ROOT
from tests.support.yaml_text import parsed

SCENARIOS = sorted(Path(__file__).parent.glob("promtool/*.test.yml"))
NAMES = [alert["alert"] for alert in ALERTS]
SERIES = {series.name: series for series in CATALOGUE}
SCRAPE_LABELS = {"job", "instance"}
"""Set by Prometheus on everything that it scrapes."""
VALUES: dict[str, set[str]] = {
    "verdict": set(VERDICTS),
    "reason": {*DROP_REASONS, *REFUSAL_REASONS},
    "stage": {*RUN_STAGES, *COLLECTOR_STAGES},
    "alert": {entry.outcome.alert for entry in VERDICT_TABLE.values() if entry.outcome.alert},
}
"""Labels with a closed list of values."""
QUERY = re.compile(r'printf ("(?:[^"\\]|\\.)*")((?: \$labels\.\w+)*) \| query')
COLLECTOR = f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"
GRAFANA = "http://127.0.0.1:3000"
_INCIDENT = {"run", "verdict", "since_step", "lead_steps", "worst_rank", "layer"}
FACTS = {
    "ForeshockGradientSpike": {"run", "since_step", "newest_step", "worst_rank", "layer"},
    "ForeshockGradientBuildUp": {"run", "since_step", "newest_step", "worst_rank", "layer"},
    "ForeshockLossSpike": {"run", "since_step", "newest_step"},
    "ForeshockExplodingGradients": _INCIDENT,
    "ForeshockSuddenNonFinite": _INCIDENT,
    "ForeshockTrainingFault": _INCIDENT - {"lead_steps"},
    "ForeshockStepsSkipped": {"run", "newest_step"},
    "ForeshockRankSilent": {"run", "newest_step", "worst_rank"},
    "ForeshockRanksMissing": {"run", "newest_step"},
    "ForeshockRunDied": _INCIDENT - {"lead_steps", "layer"},
    "ForeshockRunStalled": _INCIDENT - {"lead_steps", "layer"},
    "ForeshockRecordsDropped": {"run", "newest_step"},
    "ForeshockCollectorDown": set(),
    "ForeshockCommitsFailing": set(),
    "ForeshockIngestLagging": set(),
    "ForeshockRecorderRefused": set(),
    "ForeshockCollectorErrors": set(),
}
"""What an alert says by itself, beside its text and its links."""
Labels = set[str] | None
"""Of a vector; None for a scalar."""


def test_the_alerts_are_these() -> None:
    assert SEVERITY == {
        "ForeshockGradientSpike": "info",
        "ForeshockGradientBuildUp": "warning",
        "ForeshockLossSpike": "info",
        "ForeshockExplodingGradients": "critical",
        "ForeshockSuddenNonFinite": "critical",
        "ForeshockTrainingFault": "warning",
        "ForeshockStepsSkipped": "warning",
        "ForeshockRunDied": "critical",
        "ForeshockRankSilent": "warning",
        "ForeshockRanksMissing": "warning",
        "ForeshockRunStalled": "warning",
        "ForeshockRecordsDropped": "warning",
        "ForeshockCollectorDown": "critical",
        "ForeshockCommitsFailing": "critical",
        "ForeshockIngestLagging": "warning",
        "ForeshockRecorderRefused": "warning",
        "ForeshockCollectorErrors": "warning",
    }


@pytest.mark.integration
def test_promtool_accepts_the_rules_and_the_configuration_that_loads_them() -> None:
    done = promtool("check", "config", PROMETHEUS_CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.name)
def test_every_alert_does_what_its_scenarios_say(file: Path) -> None:
    wrong, opposites, said = judged(file)
    assert wrong - opposites == Counter(), said


def test_every_alert_has_a_scenario_that_fires_it_and_one_that_does_not() -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for file in SCENARIOS:
        for test in parsed(file.read_text())["tests"]:
            for assertion in test["alert_rule_test"]:
                (fires if assertion.get("exp_alerts") else quiet).add(assertion["alertname"])
    assert fires == set(NAMES)
    assert quiet == set(NAMES)


@pytest.mark.integration
@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.name)
def test_every_single_expectation_fails_once_it_is_turned_round(file: Path) -> None:
    """Shows that no expectation holds by accident of a misspelled name or of a scenario that ends too early."""
    wrong, opposites, said = judged(file)
    assert opposites - wrong == Counter(), said


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_an_alert_names_only_series_of_the_catalogue_and_is_about_one_run_or_one_collector(
    alert: dict[str, Any],
) -> None:
    about = labels_of(promql.parse(alert["expr"]))
    one_run = "run" in alert["annotations"]
    # A collector that is down has no labels.
    one_collector = set() if alert["alert"] == "ForeshockCollectorDown" else {"instance"}
    assert about == ({"experiment", "run"} if one_run else one_collector)
    assert set(alert["labels"]) == {"severity"}


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_what_an_annotation_asks_for_is_in_the_catalogue(alert: dict[str, Any]) -> None:
    known = {label for series in CATALOGUE for label in series.labels}
    for annotation in alert["annotations"].values():
        asked = QUERY.findall(annotation)
        assert len(asked) == annotation.count("| query")
        for text, arguments in asked:
            query = json.loads(text)
            assert len(set(re.findall(r"%\[\d\]q", query)) or re.findall("%q", query)) == len(arguments.split())
            labels_of(promql.parse(re.sub(r"%(\[\d\])?q", '"x"', query)))
        assert set(re.findall(r'\.Labels\.(\w+)|label "(\w+)"', annotation)) <= {
            pair for label in known for pair in ((label, ""), ("", label))
        }


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_an_alert_is_about_the_verdicts_that_the_table_gives_it(alert: dict[str, Any]) -> None:
    its = [cause for cause, entry in VERDICT_TABLE.items() if entry.outcome.alert == alert["alert"]]
    asked = {tuple(found.split("|")) for found in re.findall(r'verdict=~?"([^"]*)"', alert["expr"])}
    assert asked == ({tuple(its)} if its else set())
    assert {VERDICT_TABLE[cause].outcome.severity for cause in its} <= {alert["labels"]["severity"]}
    named = set(re.findall(r'alert=\\"(\w+)', "".join(alert["annotations"].values())))
    assert named == ({alert["alert"]} if its else set())


def test_every_verdict_has_an_entry_and_its_alert_a_rule() -> None:
    assert set(get_args(Cause)) == VERDICT_TABLE.keys()
    outcomes = [entry.outcome for entry in VERDICT_TABLE.values()]
    assert {outcome.alert for outcome in outcomes} - {""} <= set(NAMES)
    assert all((outcome.severity is None) == (not outcome.alert) for outcome in outcomes)


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_an_alert_says_one_fixed_sentence_and_what_is_known(alert: dict[str, Any]) -> None:
    said = alert["annotations"]
    links = {"runbook_url", "dashboard_url"} | ({"page_url"} if "run" in said else set())
    assert set(said) == {"summary", "description"} | links | FACTS[alert["alert"]]
    assert re.fullmatch(r"[A-Z][^{}]*\.", said["summary"])
    assert said.get("run", "{{ $labels.run }}") == "{{ $labels.run }}"


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_a_link_names_its_address_once_and_nothing_else_names_one(alert: dict[str, Any]) -> None:
    links = links_of(alert)
    assert links["runbook_url"] == f"{COLLECTOR}/runbooks/{alert['alert']}"
    assert (ROOT / "docs/runbooks" / f"{alert['alert']}.md").is_file()
    if "run" in alert["annotations"]:
        assert links["page_url"].startswith(f"{COLLECTOR}/run/{{{{ $labels.run | urlquery")
    assert links["dashboard_url"].startswith(f"{GRAFANA}/d/foreshock-")
    assert json.dumps(alert).count("http") == len(links)


def test_every_rule_reads_back_as_the_alert_that_it_was_written_from() -> None:
    """The rule file is laid out by our own code, so a YAML parser checks it."""
    for alert, rule in zip(alerts.ALERTS, ALERTS, strict=True):
        written = {"alert": alert.name, "expr": alert.expr, "for": alert.wait, "keep_firing_for": alert.keep_firing_for}
        read = {key: value for key, value in rule.items() if isinstance(value, str)}
        assert read == {key: value for key, value in written.items() if value}
        assert rule["labels"] == {"severity": alert.severity}
        texts = {name: value.as_value().replace("\n", " ") for name, value in alert.values.items()}
        if alert.of_run:
            texts["run"] = "{{ $labels.run }}"
        texts |= {"summary": alert.summary, **Addresses().links(alert)}
        assert {name: text for name, text in rule["annotations"].items() if name != "description"} == texts


@pytest.mark.integration
def test_the_documented_command_points_every_link_to_other_addresses() -> None:
    """Both of them: in a checkout, and where only the wheel is installed."""
    page = (ROOT / "docs/deploy.md").read_text().replace(" \\\n     ", "")
    ((_, line), (module, same)) = re.findall(
        r'^ +(make rules ARGS=|python -m [\w.]+) ?"?(--[^">]*)', page, re.MULTILINE
    )
    options = shlex.split(line)
    assert options == shlex.split(same) and options[::2] == ["--collector-url", "--grafana-url"]
    text = rule_file(Addresses(collector=options[1], grafana=options[3]))
    command = [sys.executable, *module.split()[1:], *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == text
    expected = {
        alert["alert"]: {
            name: link.replace(COLLECTOR, "https://foreshock.example.org").replace(
                GRAFANA, "https://grafana.example.org"
            )
            for name, link in links_of(alert).items()
        }
        for alert in ALERTS
    }
    assert {rule["alert"]: links_of(rule) for rule in parsed(text)["groups"][0]["rules"]} == expected


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_grafanas_alert_has_the_same_links_and_no_empty_annotation(alert: dict[str, Any]) -> None:
    (group,) = parsed((ROOT / "grafana/provisioning/alerting/foreshock.yml").read_text())["groups"]
    (twin,) = (rule for rule in group["rules"] if rule["title"] == alert["alert"])
    assert links_of(twin) == links_of(alert)
    assert all(twin["annotations"].values())


def links_of(alert: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in alert["annotations"].items() if name.endswith("_url")}


def test_every_runbook_belongs_to_an_alert_and_answers_the_same_questions() -> None:
    pages = {page.stem: page.read_text() for page in (ROOT / "docs/runbooks").glob("*.md")}
    assert set(pages) == set(NAMES)
    questions = [
        "What it means",
        "How sure we are",
        "Look here first",
        "What to try now",
        "What to change for the next run",
        "When to ignore it",
    ]
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n"), name
        _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
        assert [section.partition("\n")[0] for section in sections] == questions, name
        assert all(section.partition("\n")[2].strip() for section in sections), name


def test_critical_alerts_outlast_the_early_signs_of_the_same_event() -> None:
    """They begin no earlier and last longer, or Alertmanager would send the early sign when they resolve."""
    held = {alert["alert"]: int(alert.get("keep_firing_for", "0m").removesuffix("m")) for alert in ALERTS}
    early = max(held[f"Foreshock{name}"] for name in ("GradientSpike", "GradientBuildUp", "LossSpike"))
    assert early < min(held["ForeshockExplodingGradients"], held["ForeshockSuddenNonFinite"])


def test_the_walk_refuses_what_is_not_in_the_catalogue() -> None:
    for wrong in (
        "foreshock_no_such_series",
        'foreshock_loss{layer="x"}',
        "max by (rank) (foreshock_loss)",
        "foreshock_loss > on (rank) foreshock_local_gradient_norm",
        'foreshock_incidents_total{verdict="exploded"}',
        "foreshock_gradient_norm",
    ):
        with pytest.raises(AssertionError):
            labels_of(promql.parse(wrong))


def labels_of(expression: Any) -> Labels:
    """Labels that the result carries; fails on a series, a label or a value that the collector does not export."""
    match expression:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _selected(expression)
        case promql.MatrixSelector():
            return _selected(expression.vector_selector)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return labels_of(expression.expr)
        case promql.Call():
            arguments = [labels_of(argument) for argument in expression.args]
            vectors = [labels for labels in arguments if labels is not None]
            if expression.func.name == "absent_over_time":
                return set()
            return vectors[0] if vectors else None
        case promql.AggregateExpr():
            return _aggregated(expression)
        case promql.BinaryExpr():
            return _combined(expression)
    raise AssertionError(f"{type(expression).__name__} is new here: {expression}")


def _exported(name: str) -> set[str]:
    """Labels of what the collector serves under this name."""
    for suffix in ("_bucket", "_sum", "_count"):
        series = SERIES.get(name.removesuffix(suffix))
        if name.endswith(suffix) and series is not None and series.kind is Kind.HISTOGRAM:
            return {*series.labels, *({"le"} if suffix == "_bucket" else ())}
    assert name in SERIES, f"{name} is not in the catalogue"
    assert SERIES[name].kind is not Kind.HISTOGRAM, f"{name} exists only with _bucket, _sum and _count"
    return set(SERIES[name].labels)


def _selected(selector: Any) -> set[str]:
    labels = _exported(selector.name)
    for matcher in selector.matchers.matchers:
        assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
        if matcher.name in VALUES:
            assert set(matcher.value.split("|")) <= VALUES[matcher.name], matcher.value
    return labels | SCRAPE_LABELS


def _aggregated(expression: Any) -> Labels:
    inner = labels_of(expression.expr)
    assert inner is not None
    if str(expression.op) in {"topk", "bottomk"}:
        return inner
    if expression.modifier is None:
        return set()
    assert expression.modifier.type == promql.AggModifierType.By, "name the labels that stay"
    kept = set(expression.modifier.labels)
    assert kept <= inner, f"{kept - inner} is not in {expression.expr}"
    return kept


def _combined(expression: Any) -> Labels:
    left, right = labels_of(expression.lhs), labels_of(expression.rhs)
    if left is None or right is None:
        return left if right is None else right
    matching = expression.modifier.matching if expression.modifier is not None else None
    if matching is not None:
        on = set(matching.labels)
        assert matching.type == promql.LabelModifierType.Include, "name the labels that match"
        assert on <= left, f"{on - left} is not in {expression.lhs}"
        assert on <= right, f"{on - right} is not in {expression.rhs}"
    elif str(expression.op) != "or":
        assert left == right, f"matched on different labels: {expression}"
    return left
