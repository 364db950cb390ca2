"""What Grafana accepts in silence and people suffer from: each check gives a list of what is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import promql_parser as promql

from foreshock_collector.catalogue import CATALOGUE, Kind
from grafana.make import HERE
from tests.support.yaml_text import parsed

Dashboard = dict[str, Any]
RULES: list[dict[str, Any]] = [
    rule
    for group in parsed((HERE / "provisioning/alerting/foreshock.yml").read_text())["groups"]
    for rule in group["rules"]
]
"""Grafana's own alert rules, as they are provisioned."""
GRID = 24
PROMETHEUS_OWN = ("job", "instance")
SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
LABELS = {series.name + suffix: set(series.labels) | ({"le"} if suffix == "_bucket" else set())
          for series in CATALOGUE for suffix in SUFFIXES.get(series.kind, ("",))}  # fmt: skip


def expressions(dashboard: Dashboard) -> Iterator[tuple[str, str]]:
    """(where, PromQL) with Grafana's variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", filled(target["expr"])
    for mark in dashboard["annotations"]["list"]:
        yield f"annotation {mark['name']}", filled(mark["target"]["expr"])


def filled(expr: str, *, interval: str = "1m") -> str:
    return expr.replace("$__rate_interval", interval).replace("$experiment", ".*").replace("$run", ".*")


def duplicate_ids(dashboard: Dashboard) -> list[str]:
    return [f"id {n} twice" for n, count in Counter(p["id"] for p in dashboard["panels"]).items() if count > 1]


def overlaps(dashboard: Dashboard) -> list[str]:
    wrong: list[str] = []
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if place["x"] + place["w"] > GRID:
            wrong.append(f"{panel['title']} sticks out")
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        if cells & taken:
            wrong.append(f"{panel['title']} covers another")
        taken |= cells
    return wrong


def unexplained(dashboard: Dashboard) -> list[str]:
    return [
        f"{panel['title']} lacks {name}"
        for panel in dashboard["panels"]
        for name, value in (
            ("a title", panel["title"]),
            ("a description", panel["description"]),
            ("a unit", panel["fieldConfig"]["defaults"].get("unit")),
        )
        if not value
    ]


def fixed_datasources(dashboard: Dashboard) -> list[str]:
    return [
        f"{panel['title']} has a data source of its own"
        for panel in dashboard["panels"]
        for part in (panel, *panel.get("targets", []))
        if part.get("datasource", {"uid": "${datasource}"})["uid"] != "${datasource}"
    ]


def foreign_names(dashboard: Dashboard) -> list[str]:
    """Series and labels that the catalogue does not have, and PromQL that is none."""
    wrong = []
    for where, expr in expressions(dashboard):
        try:
            tree = promql.parse(expr)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            continue
        for selector in selectors(tree):
            known = LABELS.get(selector.name)
            if known is None:
                wrong.append(f"{where}: no series {selector.name}")
            elif strange := {m.name for m in selector.matchers.matchers} - known - {"__name__"}:
                wrong.append(f"{where}: {selector.name} has no label {', '.join(sorted(strange))}")
        # But to tell the collector's process_* series from those of other programs.
        unmatched = expr.replace("on (job, instance) foreshock_build_info", "")
        if any(re.search(rf"\b{label}\b\s*[=!,)]", unmatched) for label in PROMETHEUS_OWN):
            wrong.append(f"{where}: {PROMETHEUS_OWN} are Prometheus' own")
    return wrong


def bare_counters(dashboard: Dashboard) -> list[str]:
    """A counter by itself shows when the collector started, and nothing else."""
    return [
        f"{where}: {name} outside of rate or increase"
        for where, expr in expressions(dashboard)
        for name in re.findall(r"foreshock_\w+_total", expr)
        if not re.search(rf"(?:rate|increase)\({name}\b", expr)
    ]


def dead_links(dashboard: Dashboard, uids: set[str]) -> list[str]:
    urls = [link["url"] for panel in dashboard["panels"] for link in panel["fieldConfig"]["defaults"].get("links", [])]
    return [url for url in urls if (found := re.match(r"/d/([\w-]+)", url)) and found[1] not in uids]


def selectors(tree: Any) -> Iterator[Any]:
    if isinstance(tree, promql.VectorSelector):
        yield tree
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(tree, name, None)
        if inner is not None:
            yield from selectors(inner)
    for inner in getattr(tree, "args", ()) or ():
        yield from selectors(inner)


CHECKS: list[Callable[[Dashboard], list[str]]] = [
    duplicate_ids, overlaps, unexplained, fixed_datasources, foreign_names, bare_counters,
]  # fmt: skip
