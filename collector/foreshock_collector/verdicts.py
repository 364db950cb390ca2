"""What diagnosis says: the named cause of a failure, what points to it, and what to try."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Cause = Literal[
    "healthy",
    "exploding_gradients",
    "first_step_nonfinite",
    "sudden_nonfinite",
    "nonfinite_gradient",
    "bad_rank",
    "amp_overflow",
    "amp_scale_collapse",
    "loss_divergence",
    "vanishing_gradients",
    "duplicate_data",
    "replica_drift",
    "stalled",
    "rank_lost",
    "unknown",
]
Root = Literal["learning_rate", "initialization", "recurrent", "normalization", "unknown"]


RUNBOOKS: dict[Cause, str] = {
    "exploding_gradients": "ForeshockExplodingGradients",
    "loss_divergence": "ForeshockTrainingFault",
    "vanishing_gradients": "ForeshockTrainingFault",
    "duplicate_data": "ForeshockTrainingFault",
    "replica_drift": "ForeshockTrainingFault",
    "stalled": "ForeshockRunStalled",
    "rank_lost": "ForeshockRanksMissing",
}
"""The page that says more."""
_RUNBOOK = "ForeshockSuddenNonFinite"
"""That of every other cause."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened, where it began, and what to try."""

    cause: Cause
    attempt: int
    first_bad_step: int
    onset_step: int | None
    """First spike or build-up that belongs to the failure."""
    lead_steps: int
    """Steps from the onset to the first non-finite one; 0 without an onset."""
    rank: int | None
    """The one rank that was bad before the all-reduce, or whose own gradient led an explosion; None: no single one."""
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
    finite: bool = False
    """Every number has stayed finite: `first_bad_step` is the first that showed the trouble."""
    ranks_alike: bool = False
    """No rank is named because all were seen to behave alike; not: because nothing is known of them."""
    likely_root: Root | None = None
    """Of an explosion: what most likely made the factors grow."""

    def as_json(self) -> dict[str, Any]:
        """For the API and the store."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        values["try"] = values.pop("try_")
        values["runbook"] = "" if self.cause == "healthy" else RUNBOOKS.get(self.cause, _RUNBOOK)
        return values
