"""A report as one HTML page that loads nothing else, or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from foreshock_collector.commands.verdict_text import since

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_CHARTS = {
    "global_norm": "Global gradient norm",
    "loss": "Loss",
    "clip_coefficient": "Clip coefficient",
    "learning_rate": "Learning rate",
}
"""Columns that get a chart, and its heading."""
_MARKS = {"build_up": ("build-up", "top left"), "nonfinite": ("not finite", "top right")}
"""Labels of marked events, and the side they are written on: the two lie close together."""
_MOST_MARKS = 20
_COLORS = {"line": "#2f6f9f", "nonfinite": "#b5452c", "build_up": "#8a8f98"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report shows."""

    title: str
    columns: dict[str, list[Any]]
    """`step`, and where known `loss`, `global_norm`, `clip_coefficient`, `learning_rate`, a value per step each."""
    events: Sequence[dict[str, Any]]
    """`kind` and `step` of each event."""
    verdicts: Sequence[dict[str, Any]]
    """Verdicts in order, as the API gives them; empty if nothing has happened."""
    heat: dict[str, dict[str, Any]]
    """By "ranks" and "layers": `steps`, `rows` and `values` [row][step] of their norms around the last incident."""
    details: Sequence[tuple[str, str]]
    """Name and value of each fact about the run."""
    healthy: str
    """Sentence shown if there is no verdict."""
    runbooks: str = ""
    """Address of the folder of runbooks; empty where no collector is known."""


def as_markdown(report: Report) -> str:
    """Return the report for an issue tracker."""
    return _TEMPLATES.get_template("report.md").render(report=report, facts=partial(_facts, runbooks=report.runbooks))


def as_page(report: Report) -> str:
    """Return the report as HTML with plotly.js inside."""
    # plotly's own HTML, made of numbers and of names that it escapes.
    charts = [(name, Markup(chart)) for name, chart in _charts(report)]  # noqa: S704
    template = _TEMPLATES.get_template("report.html")
    return template.render(report=report, facts=partial(_facts, runbooks=report.runbooks), charts=charts)


def _charts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of each chart."""
    from plotly.io import to_html

    for number, (name, figure) in enumerate(_figures(report)):
        figure.update_layout(
            template="plotly_white", height=280, margin={"l": 60, "r": 20, "t": 24, "b": 40}, xaxis_title="step"
        )
        yield name, to_html(figure, full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})


def _figures(report: Report) -> Iterator[tuple[str, Any]]:
    import plotly.graph_objects as go

    for column, name in _CHARTS.items():
        values = [_finite(value) for value in report.columns.get(column, [])]
        if any(value is not None for value in values):
            line = {"color": _COLORS["line"], "width": 1.5}
            figure = go.Figure(go.Scattergl(x=report.columns["step"], y=values, mode="lines", line=line, name=name))
            _mark_events(figure, report.events)
            if column == "global_norm":
                figure.update_yaxes(type="log")
            yield name, figure
    for by, cells in report.heat.items():
        logarithms = [[_logarithm(value) for value in row] for row in cells["values"]]
        scale: dict[str, Any] = {"colorscale": "Cividis", "colorbar": {"title": "log10 norm"}}
        figure = go.Figure(go.Heatmap(x=cells["steps"], y=cells["rows"], z=logarithms, **scale))
        figure.update_yaxes(type="category")
        yield f"Norm by {by.removesuffix('s')}, around the incident", figure


def _mark_events(figure: Any, events: Sequence[dict[str, Any]]) -> None:
    for kind, (text, side) in _MARKS.items():
        style = {"line_width": 1, "line_dash": "dot", "line_color": _COLORS[kind], "annotation_position": side}
        for event in [event for event in events if event["kind"] == kind][:_MOST_MARKS]:
            figure.add_vline(x=event["step"], annotation_text=text, **style)


def _facts(verdict: dict[str, Any], runbooks: str) -> list[tuple[str, str]]:
    facts = [
        ("confidence", f"{verdict['confidence']:.0%}"),
        (since(verdict), str(verdict["first_bad_step"])),
    ]
    if verdict["onset_step"] is not None:
        facts.append(("began at step", f"{verdict['onset_step']}, {verdict['lead_steps']} steps before"))
    if verdict["likely_root"]:
        facts.append(("likely root", verdict["likely_root"].replace("_", " ")))
    if verdict["rank"] is not None:
        facts.append(("rank", str(verdict["rank"])))
    elif verdict["ranks_alike"]:
        facts.append(("rank", "all ranks"))
    if verdict["layer"]:
        facts.append(("layer", verdict["layer"]))
    facts.append(("runbook", f"{runbooks}/{verdict['runbook']}" if runbooks else verdict["runbook"]))
    return facts


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _logarithm(value: Any) -> float | None:
    number = _finite(value)
    return math.log10(number) if number and number > 0 else None
