"""Panels that show one series, or a rate, a share or a state of it; and the list of alerts."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from grafana.panels import LABELS, Panel, Query

RATE = "$__rate_interval"
ALERTS = Panel(
    title="Alerts",
    description="What fires now. Each alert has a runbook; start there.",
    kind="alertlist",
    queries=(),
    width=8,
)


def of(series: c.Series, extra: str = "", suffix: str = "") -> str:
    """Return a selector for one run's series."""
    return f"{series.name}{suffix}{{{LABELS}{', ' + extra if extra else ''}}}"


def gauge(title: str, series: c.Series, description: str, **changes: object) -> Panel:
    """Return a panel with a gauge over time. changes: panel members to override."""
    values: dict[str, object] = {
        "title": title,
        "description": f"{series.help} {description}".strip(),
        "kind": "timeseries",
        "queries": (Query(expr=of(series), legend="{{run}}"),),
        "width": 12,
    }
    return Panel(**(values | changes))  # type: ignore[arg-type]


def stat(
    title: str,
    expr: str,
    description: str,
    *,
    unit: str = "short",
    orange: float | None = None,
    red: float | None = None,
    states: dict[str, tuple[str, str]] | None = None,
) -> Panel:
    """Return a panel with one number. orange, red: thresholds. states: value to (text, color)."""
    limits = ((orange, "orange"), (red, "red"))
    return Panel(
        title=title,
        description=description,
        kind="stat",
        queries=(Query(expr=expr, instant=True),),
        unit=unit,
        width=6,
        height=4,
        thresholds=tuple((value, color) for value, color in limits if value is not None),
        mappings=states or {},
    )


def rate(title: str, series: c.Series, description: str, *, unit: str) -> Panel:
    """Return a panel with a counter's rate per run."""
    query = Query(expr=f"sum by (experiment, run) (rate({of(series)}[{RATE}]))", legend="{{run}}")
    return Panel(title=title, description=description, kind="timeseries", queries=(query,), unit=unit)


def increase(title: str, series: c.Series, description: str, *, by: str = "experiment, run") -> Panel:
    """Return a panel with a counter's increase."""
    legend = "{{source}} {{kind}}" if by == "source, kind" else "{{run}}"
    query = Query(expr=f"sum by ({by}) (increase({of(series)}[{RATE}]))", legend=legend)
    return Panel(title=title, description=description, kind="timeseries", queries=(query,))


def shares(title: str, *shares: tuple[str, str]) -> Panel:
    """Return a panel with shares of all steps. shares: pairs of query and legend."""
    return Panel(
        title=title,
        description="Share of all steps. More than one skipped step in twenty fires an alert.",
        kind="timeseries",
        queries=tuple(Query(expr=expr, legend=legend, may_be_empty=True) for expr, legend in shares),
        unit="percentunit",
        width=8,
    )
