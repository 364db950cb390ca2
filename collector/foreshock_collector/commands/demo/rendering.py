"""Renders the demo's live table of steps, its alerts, and the outcome of each act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

SHOWN_STEPS = 14
_MARKS = {
    "build_up": ("build-up", "bold yellow"),
    "spike": ("spike", "yellow"),
    "loss_spike": ("loss spike", "yellow"),
    "nonfinite": ("NOT FINITE", "bold red"),
}
"""Labels and styles of events, mildest first; the worst event of a step is shown."""

Steps = dict[str, Any]
"""Columns of steps from /api/v1/runs/{run}/steps."""


def live_table(title: str, steps: Steps, events: Sequence[dict[str, Any]]) -> RenderableType:
    """Return a table of the newest steps."""
    marks: dict[int, str] = {}
    for kind in ("loss_spike", "spike", "build_up", "nonfinite"):
        marks |= {event["step"]: kind for event in events if event["kind"] == kind}
    local = steps["local_norm"] or {}
    table = Table(title=title, title_justify="left", title_style="bold", min_width=76)
    table.add_column("step", justify="right")
    table.add_column("loss", justify="right")
    for rank in local:
        table.add_column(f"rank {rank} norm", justify="right")
    table.add_column("global norm", justify="right")
    table.add_column("state", min_width=10)
    for i in range(len(steps["step"]))[-SHOWN_STEPS:]:
        step = steps["step"][i]
        state, style = _MARKS.get(marks.get(step, ""), ("steady", "dim"))
        table.add_row(
            str(step),
            _number(steps["loss"][i], steps["loss_nonfinite"][i]),
            *(_local(norms[i]) for norms in local.values()),
            _number(steps["global_norm"][i], steps["gradient_nonfinite"][i]),
            Text(state, style),
        )
    return table


def alert_lines(alerts: Sequence[dict[str, Any]]) -> RenderableType:
    """List the alerts that notify people, and those that are inhibited."""
    table = Table.grid(padding=(0, 2))
    for alert in alerts:
        inhibited = bool(alert["status"]["inhibitedBy"])
        severity = alert["labels"]["severity"]
        style = {"critical": "bold red", "warning": "yellow"}.get(severity, "dim")
        name = Text(alert["labels"]["alertname"], "dim" if inhibited else style)
        table.add_row(
            severity, name, "inhibited by a more severe alert" if inhibited else alert["annotations"]["summary"]
        )
    return Padding(Group(Text("Alertmanager", "bold"), table), (0, 2))


def print_outcome(console: Console, expected: bool, text: str) -> None:
    """Print whether the act went as expected."""
    mark = Text("as expected: ", "bold green") if expected else Text("NOT as expected: ", "bold red")
    console.print(Padding(mark.append(text, "default"), (0, 2, 1, 2)))


def _number(value: float | None, nonfinite: str = "") -> Text:
    if nonfinite:
        return Text({"nan": "NaN", "inf": "Inf"}[nonfinite], "bold red")
    return Text("-", "dim") if value is None else Text(f"{value:.4g}")


def _local(value: float | str | None) -> Text:
    """Format a local norm, for which the API returns "nan" or "inf" in place of the number."""
    return _number(None, value) if isinstance(value, str) else _number(value)
