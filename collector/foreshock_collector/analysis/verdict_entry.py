"""What an entry of the verdict table consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["critical", "warning"]
Condition = Literal["failing", "building up", "stalled", "ranks missing", "running", "failed", "interrupted", "ended"]
"""State of a run, as status and the page show it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Consequences of a verdict: its alert, severity and the run's condition."""

    alert: str
    """Alert that fires, and name of its runbook; empty if the verdict needs no action."""
    severity: Severity | None
    """Severity of the alert."""
    condition: Condition
    """Condition of a run while an incident with this verdict is open."""
    finite: bool
    """Whether all values stayed finite."""
    names_last_step: bool = False
    """Whether the step of the verdict is the last one that was made, instead of the first bad one."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Texts of a verdict, as templates such as `step {step}` that diagnosis fills in.

    Available everywhere: `{step}`, `{rank}`, and `{where}`, which is " on rank 1" or empty if no single rank is named.
    """

    summary: str
    advice: tuple[str, ...]
    """What to try, the most promising first."""
    alternatives: tuple[str, ...] = ()
    """Other explanations of the same evidence."""
    confidence: float
    """From 0 to 1, by rule of thumb."""


@dataclass(frozen=True, kw_only=True)
class Entry(Wording):
    """Defines one verdict."""

    title: str
    outcome: Outcome
    observed: str
    """What the records show when this verdict is given, for the documentation."""
    variants: Mapping[str, Wording] = field(default_factory=dict)
    """Wordings for special cases of the same cause."""
