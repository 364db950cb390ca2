"""What diagnosis says: the named cause of a failure, what points to it, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal[
    "healthy",
    "exploding_gradients",
    "first_step_nonfinite",
    "sudden_nonfinite",
    "nonfinite_gradient",
    "nonfinite_divergence",
    "bad_rank",
    "amp_overflow",
    "amp_scale_collapse",
    "loss_divergence",
    "vanishing_gradients",
    "duplicate_data",
    "replica_drift",
    "outlier_rank",
    "stalled",
    "rank_lost",
    "crashed",
    "unknown",
]
Root = Literal["learning_rate", "initialization", "recurrent", "normalization", "unknown"]
Severity = Literal["critical", "warning"]
Condition = Literal["failing", "building up", "stalled", "ranks missing", "running", "failed", "interrupted", "ended"]
"""How a run is, in one word."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a verdict leads to."""

    alert: str
    """The one that fires, and the name of its runbook; empty: nobody needs to know."""
    severity: Severity | None
    condition: Condition
    """Of a run while an incident with this verdict is open."""
    finite: bool
    """Every number has stayed finite."""


_WELL = Expectation(alert="", severity=None, condition="running", finite=True)
_EXPLODED = Expectation(alert="ForeshockExplodingGradients", severity="critical", condition="failing", finite=False)
_NONFINITE = Expectation(alert="ForeshockSuddenNonFinite", severity="critical", condition="failing", finite=False)
_FAULT = Expectation(alert="ForeshockTrainingFault", severity="warning", condition="running", finite=True)
_STALLED = Expectation(alert="ForeshockRunStalled", severity="warning", condition="stalled", finite=True)
_DIED = Expectation(alert="ForeshockRunDied", severity="critical", condition="failed", finite=True)

EXPECTED: dict[Cause, Expectation] = {
    "healthy": _WELL,
    "exploding_gradients": _EXPLODED,
    "first_step_nonfinite": _NONFINITE,
    "sudden_nonfinite": _NONFINITE,
    "nonfinite_gradient": _NONFINITE,
    "nonfinite_divergence": _NONFINITE,
    "bad_rank": _NONFINITE,
    "amp_overflow": Expectation(alert="", severity=None, condition="running", finite=False),
    "amp_scale_collapse": _NONFINITE,
    "loss_divergence": _FAULT,
    "vanishing_gradients": _FAULT,
    "duplicate_data": _FAULT,
    "replica_drift": _FAULT,
    "outlier_rank": _FAULT,
    "stalled": _STALLED,
    "rank_lost": _DIED,
    "crashed": _DIED,
    "unknown": _NONFINITE,
}
"""Every verdict. The catalogue, the page and the alert rules follow, or are tested against it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened, where it began, and what to try."""

    cause: Cause
    attempt: int
    first_bad_step: int
    """The first that was not finite; where all were, the first that showed the trouble, or the last that was made."""
    onset_step: int | None
    """First spike or build-up that belongs to the failure."""
    lead_steps: int
    """Steps from the onset to the first non-finite one; 0 without an onset."""
    rank: int | None
    """The one rank that was bad before the all-reduce, led an explosion, left first, or holds up the others; None: no
    single one."""
    parameter: str
    """First in backward order that was not finite; empty where that is not known, or means nothing."""
    layer: str
    """The parameter's, or the one whose norm grew most."""
    confidence: float
    """From 0 to 1, by rule of thumb."""
    summary: str
    evidence: tuple[str, ...]
    try_: tuple[str, ...]
    alternatives: tuple[str, ...]
    ranks_alike: bool = False
    """No rank is named because all were seen to behave alike; not: because nothing is known of them."""
    likely_root: Root | None = None
    """Of an explosion: what most likely made the factors grow."""


def finite_verdict(
    cause: Cause,
    attempt: int,
    *,
    step: int,
    rank: int | None,
    confidence: float,
    summary: str,
    evidence: Sequence[str],
    try_: tuple[str, ...],
    alternatives: tuple[str, ...],
    layer: str = "",
) -> Verdict:
    """One on a trouble without a NaN: nothing precedes its first step."""
    assert EXPECTED[cause].finite
    return Verdict(
        cause=cause,
        attempt=attempt,
        first_bad_step=step,
        onset_step=None,
        lead_steps=0,
        rank=rank,
        parameter="",
        layer=layer,
        confidence=confidence,
        summary=summary,
        evidence=tuple(evidence),
        try_=try_,
        alternatives=alternatives,
    )
