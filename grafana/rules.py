"""Grafana-managed alert rules, made from the Prometheus rules: for those who have no Alertmanager."""

from __future__ import annotations

import re
from typing import Any

from grafana.panels import Json

DATASOURCE_UID = "foreshock-prometheus"
"""As grafana/provisioning/datasources names it."""
_TOKENS = re.compile(r"(\{\{.*?\}\})", re.DOTALL)
_WINDOW_SECONDS = 600


def alerting(groups: list[Json]) -> Json:
    """A provisioning file. groups: of the Prometheus rule file."""
    return {"apiVersion": 1, "groups": [_group(group) for group in groups]}


def present(expr: str) -> str:
    """1 for every series that `expr` gives, whatever its value: a Prometheus alert fires on presence alone.

    x ^ 0 is 1 for every x, for NaN and Inf too.
    """
    return f"({expr.strip()}) ^ 0"


def _group(group: Json) -> Json:
    return {
        "orgId": 1,
        "name": group["name"],
        "folder": "Foreshock",
        "interval": "10s",
        "rules": [_rule(rule) for rule in group["rules"]],
    }


def _rule(rule: Json) -> Json:
    of_a_run = "run" in rule["annotations"]["description"] and "absent(" not in rule["expr"]
    result: Json = {
        "uid": "fs-" + re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"].removeprefix("Foreshock")).lower(),
        "title": rule["alert"],
        "condition": "C",
        "for": rule.get("for", "0s"),
        "noDataState": "OK",  # no series: nothing to fire on, as in Prometheus
        "execErrState": "Error",
        "dashboardUid": "foreshock-run" if of_a_run else "foreshock-collector",
        "panelId": 1,
        "labels": dict(rule["labels"]),
        "annotations": {name: said for name, text in rule["annotations"].items() if (said := _plain(text))},
        # B is for people: its value stands in the description.
        "data": [_query("A", present(rule["expr"])), _query("B", rule["expr"].strip()), _threshold()],
    }
    if "keep_firing_for" in rule:
        result["keepFiringFor"] = rule["keep_firing_for"]
    return result


def _query(letter: str, expr: str) -> Json:
    return {
        "refId": letter,
        "datasourceUid": DATASOURCE_UID,
        "relativeTimeRange": {"from": _WINDOW_SECONDS, "to": 0},
        "model": {"refId": letter, "expr": expr, "instant": True, "range": False},
    }


def _threshold() -> Json:
    conditions: list[dict[str, Any]] = [{"evaluator": {"type": "gt", "params": [0]}}]
    return {
        "refId": "C",
        "datasourceUid": "__expr__",
        "relativeTimeRange": {"from": _WINDOW_SECONDS, "to": 0},
        "model": {"refId": "C", "type": "threshold", "expression": "A", "conditions": conditions},
    }


def _plain(text: str) -> str:
    """Grafana's templates cannot ask Prometheus: blocks that do are left out; what they say is on the linked page."""
    text = text.replace("$value", "$values.B.Value")
    kept, depth, hidden = [], 0, 0
    for part in _TOKENS.split(text):
        word = part.strip("{}- ").split(" ", 1)[0] if part.startswith("{{") else ""
        depth += word in ("with", "range", "if")
        hidden = hidden or (depth if "| query" in part else 0)
        if not hidden:
            kept.append(part)
        if word == "end":
            hidden = 0 if hidden == depth else hidden
            depth -= 1
    assert depth == 0, text
    return re.sub(r"\s+", " ", "".join(kept)).strip().replace(" .", ".").replace(" :", ":")
