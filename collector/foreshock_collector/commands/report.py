"""`foreshock report`: one run or recorded log as a page of its own, or as Markdown for an issue tracker."""

from __future__ import annotations

import html
import math
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock_collector.commands.client import ClientError, add_url, ask
from foreshock_collector.commands.logs import LogError
from foreshock_collector.commands.replay import Replay, replay_file
from foreshock_collector.commands.verdict_text import since
from foreshock_collector.config import ConfigError, Parser
from foreshock_collector.web.answers import verdict_answer

_BEFORE, _AFTER = 96, 16
"""Steps around an incident that the heat maps show."""
_MARKS = {"build_up": ("build-up", "top left"), "nonfinite": ("not finite", "top right")}
"""What is written beside which events, and on which side: the two lie close together."""
_MOST_MARKS = 20
_COLORS = {"line": "#2f6f9f", "mark": "#b5452c", "quiet": "#8a8f98"}
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2129; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .what { font-size: 1.15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; } dt { color: #5c6470; } dd { margin: 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that it says."""

    title: str
    columns: dict[str, list[Any]]
    """`step`, and where known `loss`, `global_norm`, `clip_coefficient`, `learning_rate`, a value per step each."""
    events: Sequence[dict[str, Any]]
    """`kind` and `step`."""
    verdicts: Sequence[dict[str, Any]]
    """As the API tells them, in order; empty: nothing has happened."""
    heat: dict[str, dict[str, Any]]
    """By "ranks" and "layers": `steps`, `rows` and `values` [row][step] of their norms around the last incident."""
    about: Sequence[tuple[str, str]]
    """What ran, and when: a name and its value each."""
    quiet: str
    """What is said where there is no verdict."""
    runbooks: str = ""
    """Address of the folder of runbooks; empty where no collector is known."""


def main(arguments: list[str]) -> int:
    """0: written; 2: no such run or file, or it cannot be read."""
    parser = Parser(prog="foreshock report", description="A run or a recorded log as one self-contained page.")
    parser.add_argument("source", metavar="RUN|FILE", help="a file if there is one of this name, else a run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it; default: standard output")
    parser.add_argument("--markdown", action="store_true", help="text for an issue tracker, without charts")
    add_url(parser)
    try:
        options = parser.parse_args(arguments)
        path = Path(options.source)
        report = from_log(path, replay_file(path)) if path.exists() else from_run(options.url, options.source)
        text = as_markdown(report) if options.markdown else as_page(report)
        if options.output is None:
            sys.stdout.write(text)
        else:
            options.output.write_text(text, encoding="utf-8")
    except (ClientError, ConfigError, LogError, OSError) as error:
        sys.stderr.write(f"foreshock report: {error}\n")
        return 2
    return 0


def from_log(path: Path, found: Replay) -> Report:
    """Of a recorded log."""
    columns: dict[str, list[Any]] = {
        "step": [row.step for row in found.log],
        "loss": [row.loss for row in found.log],
        "global_norm": [row.norm for row in found.log],
        "learning_rate": [row.rate for row in found.log],
    }
    events = [{"kind": event.kind, "step": event.step} for event in found.events]
    verdicts = [] if found.verdict.cause == "healthy" else [verdict_answer(found.verdict)]
    return Report(
        title=path.name,
        columns=columns,
        events=events,
        verdicts=verdicts,
        heat={},
        about=[("rows", f"{len(found.log):,}, of a recorded log: nothing is known of its ranks, layers and model")],
        quiet=f"Nothing has happened: {len(found.log):,} rows, all finite.",
    )


def from_run(url: str, name: str) -> Report:
    """Of a run that a collector knows. Raises `ClientError`."""
    run = ask(url, "runs", name)
    series = ask(url, "runs", name, "series", points=2000)
    verdicts = [incident["verdict"] for incident in run["incidents"]]
    events = [event for event in run["events"] if event["attempt"] == run["attempt"]]
    heat = {}
    if verdicts and verdicts[-1]["attempt"] == run["attempt"]:
        bad = next((e["sequence"] for e in reversed(events) if e["kind"] == "nonfinite"), series["newest"])
        for by in ("ranks", "layers"):
            cells = ask(url, "runs", name, "heat", by, first=max(1, bad - _BEFORE), last=bad + _AFTER, columns=2000)
            if cells["values"]:
                # Sequence numbers start at 1; the page speaks of the script's own steps.
                shift = verdicts[-1]["first_bad_step"] - bad
                steps = [sequence + shift for sequence in cells["sequence"]]
                heat[by] = {"steps": steps, "rows": cells["rows"], "values": cells["values"]}
    return Report(
        title=name,
        columns=series,
        events=events,
        verdicts=verdicts,
        heat=heat,
        about=_about(run, url),
        quiet=_quiet(run["counters"]),
        runbooks=f"{url.rstrip('/')}/runbooks",
    )


def _about(run: dict[str, Any], url: str) -> list[tuple[str, str]]:
    model, optimizer, attempts = run["model"], run["optimizer"], len(run["attempts"])
    ended = max(run["last_step_seconds"], run["last_report_seconds"])
    size = f"{len(model['layers'])} layers, {model['elements']:,} elements in {model['parameters']:,} parameters"
    facts = [
        ("experiment", run["experiment"]),
        ("condition", run["condition"]),
        ("attempt", f"{run['attempt']}, the newest of {attempts}" if attempts > 1 else f"{run['attempt']}"),
        ("ranks", _ranks(run)),
        ("model", f"{model['type']}, {size}" if model["type"] else ""),
        ("optimizer", optimizer["type"] + (", fused" if optimizer["fused"] else "")),
        ("clip", run["clip"]),
        ("began", _moment(run["started_seconds"]) if run["started_seconds"] else ""),
        ("ran for", _span(ended - run["started_seconds"]) if run["started_seconds"] else ""),
        ("last report", _moment(run["last_report_seconds"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))),
        ("page", f"{url.rstrip('/')}/run/{urllib.parse.quote(run['run'], safe='')}"),
    ]
    return [(name, value) for name, value in facts if value]


def _ranks(run: dict[str, Any]) -> str:
    there, all_ = run["ranks_reporting"], run["world_size"]
    if run["state"] == "active":
        return f"{there} of {all_} reporting"
    return f"{all_}" if there == all_ else f"{all_}, of which {all_ - there} did not leave as they should"


def _quiet(counters: dict[str, Any]) -> str:
    bad = [f"{what} {count:,}" for what, count in counters["nonfinite"].items() if count]
    how = f"not all finite ({', '.join(bad)}), without harm" if bad else "all finite"
    return f"Nothing has happened: {counters['steps']:,} steps, {how}."


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def as_markdown(report: Report) -> str:
    """For an issue tracker."""
    lines = [f"# {report.title}", ""]
    for verdict in report.verdicts:
        lines += [f"**{verdict['cause']}**: {verdict['summary']}", ""]
        lines += [f"- {name}: {value}" for name, value in _facts(verdict, report.runbooks)]
        lines += ["", "Evidence:", "", *(f"- {line}" for line in verdict["evidence"])]
        lines += ["", "To try:", "", *(f"{number}. {line}" for number, line in enumerate(verdict["try"], 1)), ""]
    if not report.verdicts:
        lines += [report.quiet, ""]
    lines += ["Run details:", "", *(f"- {name}: {value}" for name, value in report.about), ""]
    return "\n".join(lines)


def as_page(report: Report) -> str:
    """HTML that needs nothing else: plotly.js is inside."""
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    for verdict in report.verdicts:
        parts.append(f'<p class="what"><b>{verdict["cause"]}</b>: {html.escape(verdict["summary"])}</p>')
        facts = "".join(
            f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(verdict, report.runbooks)
        )
        parts.append(f"<dl>{facts}</dl>")
        parts.append(f"<h2>Evidence</h2><ul>{_items(verdict['evidence'])}</ul>")
        parts.append(f"<h2>To try</h2><ol>{_items(verdict['try'])}</ol>")
    if not report.verdicts:
        parts.append(f'<p class="what">{html.escape(report.quiet)}</p>')
    about = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in report.about)
    parts.append(f"<h2>Run details</h2><dl>{about}</dl>")
    parts += _charts(report)
    title = html.escape(report.title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )


def _charts(report: Report) -> list[str]:
    import plotly.graph_objects as go
    from plotly.io import to_html

    figures = []
    names = {
        "global_norm": "global gradient norm",
        "loss": "loss",
        "clip_coefficient": "clip coefficient",
        "learning_rate": "learning rate",
    }
    for column, name in names.items():
        values = [_finite(value) for value in report.columns.get(column, [])]
        if not any(value is not None for value in values):
            continue
        line = {"color": _COLORS["line"], "width": 1.5}
        figure = go.Figure(go.Scattergl(x=report.columns["step"], y=values, mode="lines", line=line, name=name))
        for kind, (text, side) in _MARKS.items():
            color = _COLORS["mark"] if kind == "nonfinite" else _COLORS["quiet"]
            look = {"line_width": 1, "line_dash": "dot", "line_color": color, "annotation_position": side}
            for event in [event for event in report.events if event["kind"] == kind][:_MOST_MARKS]:
                figure.add_vline(x=event["step"], annotation_text=text, **look)
        if column == "global_norm":
            figure.update_yaxes(type="log")
        figures.append((name, figure))
    for by, cells in report.heat.items():
        logarithms = [[_logarithm(value) for value in row] for row in cells["values"]]
        bar = {"title": "log10 norm"}
        figure = go.Figure(
            go.Heatmap(x=cells["steps"], y=cells["rows"], z=logarithms, colorscale="Cividis", colorbar=bar)
        )
        figure.update_yaxes(type="category")
        figures.append((f"norm by {by.removesuffix('s')}, around the incident", figure))
    parts = []
    for number, (name, figure) in enumerate(figures):
        figure.update_layout(
            template="plotly_white", height=280, margin={"l": 60, "r": 20, "t": 24, "b": 40}, xaxis_title="step"
        )
        chart = to_html(figure, full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        parts.append(f"<h2>{name[0].upper()}{name[1:]}</h2>{chart}")
    return parts


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


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _logarithm(value: Any) -> float | None:
    number = _finite(value)
    return math.log10(number) if number and number > 0 else None
