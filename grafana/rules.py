"""Grafana-managed copies of the alerts, for users without an Alertmanager."""

from __future__ import annotations

import re
from typing import Any

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.alert import RUN_LABEL, Alert
from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.alerting.lookups import Lookup
from foreshock_collector.alerting.rule_file import GROUP
from grafana.panels import Json

DATASOURCE_UID = "foreshock-prometheus"
"""Must match grafana/provisioning/datasources."""
_WINDOW_SECONDS = 600


def alerting(addresses: Addresses) -> Json:
    """Return a provisioning file with one rule for each alert."""
    group = {
        "orgId": 1,
        "name": GROUP,
        "folder": "Foreshock",
        "interval": "10s",
        "rules": [_rule(alert, addresses) for alert in ALERTS],
    }
    return {"apiVersion": 1, "groups": [group]}


def present(expr: str) -> str:
    """Map every series that `expr` returns to 1, because a Prometheus alert fires whatever the value.

    x ^ 0 is 1 for every x, including NaN and Inf.
    """
    return f"({expr}) ^ 0"


def _rule(alert: Alert, addresses: Addresses) -> Json:
    result: Json = {
        "uid": "fs-" + re.sub(r"(?<!^)(?=[A-Z])", "-", alert.name.removeprefix("Foreshock")).lower(),
        "title": alert.name,
        "condition": "C",
        "for": alert.wait or "0s",
        "noDataState": "OK",  # no series means that nothing fires, as in Prometheus
        "execErrState": "Error",
        "dashboardUid": alert.dashboard,
        "panelId": 1,
        "labels": {"severity": alert.severity},
        "annotations": _annotations(alert, addresses),
        # B is for people: the description shows its value.
        "data": [_query("A", present(alert.expr)), _query("B", alert.expr), _threshold()],
    }
    if alert.keep_firing_for:
        result["keepFiringFor"] = alert.keep_firing_for
    return result


def _annotations(alert: Alert, addresses: Addresses) -> dict[str, str]:
    # Grafana's templates cannot query: what a lookup would say is on the linked page.
    sentences = [part for part in alert.description if not isinstance(part, Lookup)]
    description = " ".join(sentences).replace("$value", "$values.B.Value")
    run = {"run": RUN_LABEL} if alert.of_run else {}
    return {"summary": alert.summary, "description": description, **run, **addresses.links(alert)}


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
