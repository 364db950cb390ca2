"""Renders a verdict as text for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def since(verdict: dict[str, Any]) -> str:
    """Return the label of the verdict's step."""
    if verdict["names_last_step"]:
        return "last step"
    return "since step" if verdict["finite"] else "not finite since step"


def verdict_table(verdict: dict[str, Any]) -> RenderableType:
    """Render a verdict from the API: what happened, where it began, what to try."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("what", Text(verdict["summary"]))
    facts.add_row("verdict", f"{verdict['cause']}, confidence {verdict['confidence']:.0%}")
    if verdict["likely_root"]:
        facts.add_row("root", verdict["likely_root"].replace("_", " "))
    if verdict["onset_step"] is not None:
        facts.add_row("began", f"step {verdict['onset_step']}")
    facts.add_row(since(verdict).removesuffix(" step"), f"step {verdict['first_bad_step']}")
    if verdict["lead_steps"]:
        facts.add_row("lead", f"{verdict['lead_steps']} step{'s' if verdict['lead_steps'] > 1 else ''}")
    if verdict["rank"] is not None:
        facts.add_row("rank", str(verdict["rank"]))
    elif verdict["ranks_alike"]:
        facts.add_row("rank", "all ranks")
    if verdict["layer"]:
        facts.add_row("layer", Text(verdict["layer"]))
    for name, lines in (("evidence", verdict["evidence"]), ("try", verdict["try"])):
        facts.add_row(name, Group(*(Text(line) for line in lines)))
    return facts
