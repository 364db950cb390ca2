"""Panels, variables and links in Grafana's classic dashboard JSON (schema version 39: Grafana 10 to 13 import it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 39
COLUMNS = 24
"""Width of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LABELS = 'experiment=~"$experiment", run=~"$run"'
"""Selector of every query about one run."""

Kind = Literal["timeseries", "stat", "table", "alertlist", "status-history"]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Query:
    """Holds one PromQL query."""

    expr: str
    legend: str = ""
    instant: bool = False
    """Whether to query only the newest value, for stats and tables."""
    may_be_empty: bool = False
    """Whether the result may be empty, as in normal operation."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Describes a panel before it has an id and a position."""

    title: str
    description: str
    """Explanation for users: what the panel shows and what to do."""
    kind: Kind
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 12
    height: int = 8
    logarithmic: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    """Thresholds and their colors; green below."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of a table: label or `Value #A` to heading, in order; others are hidden."""
    mappings: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Mapping of values to text and color."""
    links: tuple[tuple[str, str], ...] = ()
    """(title, address) of data links; addresses may name `${__field.labels.run}`."""


def dashboard(
    uid: str, title: str, description: str, variables: Sequence[Json], rows: Sequence[Sequence[Panel]]
) -> Json:
    """Return a complete dashboard. rows: panels from left to right, at most 24 columns wide in total."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["foreshock"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(variables)},
        "annotations": {"list": _annotations()},
        "links": _links(uid),
        "panels": _placed(rows),
    }


def variables(*, one_run: bool) -> list[Json]:
    """Return the variables: data source, experiment, run and the address of the collector's page."""
    every = {"includeAll": True, "allValue": ".*", "multi": True, "current": {"text": "All", "value": "$__all"}}
    one = {"includeAll": False, "multi": False}
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _labels("experiment", "label_values(foreshock_run_info, experiment)", every),
        _labels("run", 'label_values(foreshock_run_info{experiment=~"$experiment"}, run)', one if one_run else every),
        {
            "name": "page",
            "label": "Collector's page",
            "type": "textbox",
            "query": "http://127.0.0.1:9327",
            "current": {"text": "http://127.0.0.1:9327", "value": "http://127.0.0.1:9327"},
        },
    ]


def _labels(name: str, query: str, selection: Json) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # on a change of the time range: runs come and go
        "sort": 1,
        **selection,
    }


def _annotations() -> list[Json]:
    marks = (
        ("Build-ups", "foreshock_last_build_up_timestamp_seconds", "orange"),
        ("Incidents", "foreshock_last_incident_timestamp_seconds", "red"),
    )
    return [
        {
            "name": name,
            "datasource": DATASOURCE,
            "enable": True,
            "iconColor": color,
            # The time stands in the value: Grafana places the mark there and not at the scrape.
            "target": {"refId": "Anno", "expr": f"{series}{{{LABELS}}} * 1000 > 0", "interval": "10s"},
            "useValueForTime": True,
            "titleFormat": f"{name}: {{{{run}}}}",
        }
        for name, series, color in marks
    ]


def _links(uid: str) -> list[Json]:
    of_all = uid == "foreshock-fleet"
    page = "${page}/" if of_all else "${page}/run/${run:percentencode}"
    return [
        _link("Foreshock", "dashboards", tags=["foreshock"]),
        _link("Page" if of_all else "Run page", "link", url=page, icon="external link", targetBlank=True),
        _link("Runbooks", "link", url="${page}/runbooks", icon="doc", targetBlank=True),
    ]


def _link(title: str, kind: str, **changes: object) -> Json:
    link: Json = {
        "title": title,
        "type": kind,
        "icon": "dashboard",
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }
    return link | changes


def _placed(rows: Sequence[Sequence[Panel]]) -> list[Json]:
    placed: list[Json] = []
    top = 0
    for row in rows:
        left = 0
        for panel in row:
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            placed.append(_panel(panel, len(placed) + 1, place))
            left += panel.width
        assert left <= COLUMNS, f"{[panel.title for panel in row]} are {left} columns wide"
        top += max(panel.height for panel in row)
    return placed


def _panel(panel: Panel, number: int, place: Json) -> Json:
    result: Json = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": DATASOURCE,
        "targets": [_target(query, chr(ord("A") + i), panel.kind) for i, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }
    if panel.columns:
        result["transformations"] = _table(panel)
    if panel.kind == "alertlist":
        del result["targets"], result["datasource"]
    return result


def _target(query: Query, letter: str, kind: Kind) -> Json:
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "instant": query.instant,
        "range": not query.instant,
        "format": "table" if kind == "table" else "time_series",
    }


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for value, color in panel.thresholds]
    result: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        scale = {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"}
        result["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "scaleDistribution": scale}
        result["color"] = {"mode": "palette-classic"}
    else:
        result["color"] = {"mode": "thresholds"}
    if panel.mappings:
        options = {value: {"text": text, "color": color} for value, (text, color) in panel.mappings.items()}
        result["mappings"] = [{"type": "value", "options": options}]
    if panel.links:
        result["links"] = [{"title": title, "url": url, "targetBlank": True} for title, url in panel.links]
    return result


def _options(panel: Panel) -> Json:
    if panel.kind == "timeseries":
        legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "stat":
        reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": reduce, "colorMode": "value", "graphMode": "none", "textMode": "auto"}
    if panel.kind == "alertlist":
        states = {"firing": True, "pending": True, "normal": False, "noData": False, "error": True}
        return {"viewMode": "list", "alertName": "Foreshock", "stateFilter": states, "maxItems": 20, "sortOrder": 3}
    if panel.kind == "status-history":
        return {"showValue": "never", "rowHeight": 0.9, "legend": {"showLegend": False}}
    return {"showHeader": True, "cellHeight": "sm"}


def _table(panel: Panel) -> list[Json]:
    return [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": list(panel.columns)}}},
        {
            "id": "organize",
            "options": {
                "indexByName": {name: i for i, name in enumerate(panel.columns)},
                "renameByName": panel.columns,
            },
        },
    ]
