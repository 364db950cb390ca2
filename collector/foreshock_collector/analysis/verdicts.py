"""A verdict: the named cause of a failure, where it began, the evidence, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE, Cause

Root = Literal["learning_rate", "initialization", "recurrent", "normalization", "unknown"]
"""What most likely made gradients explode."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Names the cause of one failure."""

    cause: Cause
    attempt: int
    first_bad_step: int
    """The first non-finite step. If all values stayed finite, the first step that showed the trouble, or the last one
    that was made; -1 if nothing is wrong."""
    onset_step: int | None = None
    """First spike or build-up that belongs to the failure."""
    lead_steps: int = 0
    """Steps from the onset to the first non-finite step; 0 without an onset."""
    rank: int | None = None
    """The single rank that was bad before the all-reduce, led an explosion, left first, or holds up the others."""
    parameter: str = ""
    """First non-finite parameter in backward order; empty if unknown or meaningless."""
    layer: str = ""
    """Layer of that parameter, or the layer whose norm grew most; empty if unknown."""
    confidence: float
    """From 0 to 1, by rule of thumb."""
    summary: str
    evidence: tuple[str, ...]
    try_: tuple[str, ...]
    """What to try, the most promising first."""
    alternatives: tuple[str, ...]
    """Other explanations of the same evidence."""
    ranks_alike: bool = False
    """Whether all ranks are known to have behaved alike. If False with no rank named, nothing is known about them."""
    likely_root: Root | None = None
    """What most likely made gradients explode; None if they did not."""


def make_verdict(
    cause: Cause,
    *,
    attempt: int,
    step: int,
    evidence: Sequence[str],
    rank: int | None = None,
    parameter: str = "",
    layer: str = "",
    variant: str = "",
    confidence: float | None = None,
    **values: object,
) -> Verdict:
    """Build a verdict with the wording of the table.

    variant: key of a special wording of the cause. confidence: instead of the table's, where the evidence is stronger
    or weaker than usual. values: what else the wording needs, by name.
    """
    entry = VERDICT_TABLE[cause]
    wording = entry.variants[variant] if variant else entry
    values |= {"step": step, "rank": rank, "where": "" if rank is None else f" on rank {rank}"}
    return Verdict(
        cause=cause,
        attempt=attempt,
        first_bad_step=step,
        rank=rank,
        parameter=parameter,
        layer=layer,
        confidence=wording.confidence if confidence is None else confidence,
        summary=wording.summary.format_map(values),
        evidence=tuple(evidence),
        try_=tuple(line.format_map(values) for line in wording.advice),
        alternatives=wording.alternatives,
    )
