"""Names the cause of a failure from the steps before it: the first rule that applies gives the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.explosion import blown_rank, counted, explosion, explosion_in_one_step
from foreshock_collector.analysis.failure_facts import FailureFacts, after_clipping, clipped_norm
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.analysis.verdict_table import Cause
from foreshock_collector.analysis.verdicts import Verdict, make_verdict
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts, Step

_FEWEST_STEPS = 2
"""Finite steps that a failure must follow to have come suddenly: one has nothing to be compared with."""
_ONE_RANK_CONFIDENCE = 0.9
"""If one rank alone was not finite, that is strong evidence, whatever the cause."""


def diagnose(
    steps: Sequence[Step],
    events: Sequence[Event],
    buffer: RecordBuffer,
    model: ModelFacts,
    *,
    finite_before: bool,
    climbing: int,
    apart: float = 1,
    overflows: int = 0,
    diverging: bool = False,
    rules: Rules = DEFAULT,
) -> Verdict:
    """Return the verdict on the last of `steps`, the first non-finite one; `healthy` if that is finite.

    The arguments are the fields of FailureFacts.
    """
    last = steps[-1]
    if not last.nonfinite:
        verdict = make_verdict("healthy", attempt=last.attempt, step=last.step, evidence=())
        return replace(verdict, first_bad_step=-1)
    failure = FailureFacts(
        steps=steps,
        events=events,
        buffer=buffer,
        model=model,
        rules=rules,
        finite_before=finite_before,
        climbing=climbing,
        apart=apart,
        overflows=overflows,
        diverging=diverging,
    )
    verdicts = (rule(failure) for rule in _RULES)
    return next(verdict for verdict in verdicts if verdict is not None)


def verdict_on_finite_log(last: Step, norms: NDArray[np.float64], *, apart: float, rules: Rules = DEFAULT) -> Verdict:
    """Return the verdict on a log whose values are all finite, and that shows no fault.

    norms: of all rows, NaN if unknown. apart: usual distance of the rows, in steps; Inf if unknown. A log that is too
    short or too sparse to show a fault is `unknown`: that is not the same as healthy.
    """
    variant = "short" if len(norms) < rules.gradient.ready_after else "" if apart < rules.sparse_steps else "sparse"
    clipped = clipped_norm(norms, rules)
    verdict = make_verdict(
        "unknown" if variant else "healthy",
        variant=variant,
        attempt=last.attempt,
        step=last.step,
        evidence=[] if clipped is None else [after_clipping(clipped)],
        rows=counted(len(norms), "row"),
        apart=f"{apart:g} steps" if math.isfinite(apart) else "epochs",
    )
    return replace(verdict, first_bad_step=-1)


def _one_rank_blew_up(failure: FailureFacts) -> Verdict | None:
    if not failure.signs or failure.rank is not None:
        return None
    rank = blown_rank(failure)
    if rank is None:
        return None
    step = failure.signs[0].step
    return _verdict(failure, "bad_rank", f"at step {step} only the local norm of rank {rank} blew up", rank=rank)


def _gradients_exploded(failure: FailureFacts) -> Verdict | None:
    return explosion(failure) if failure.signs else None


def _loss_exploded_in_that_step(failure: FailureFacts) -> Verdict | None:
    usual = failure.usual_loss
    loss = failure.bad.loss
    if failure.rank is not None or loss is None or not failure.loss_is_finite or usual is None:
        return None
    exploded = loss >= math.exp(failure.rules.gradient.steep_rise) * usual > 0
    return explosion_in_one_step(failure, usual) if exploded else None


def _scaler_skipped_overflows(failure: FailureFacts) -> Verdict | None:
    """Apply to a log, which does not show the loss scale but only that a run survives its overflows."""
    if not failure.overflows or failure.bad.overflow:
        return None
    line = f"the loss stays finite: {counted(failure.overflows, 'step')} skipped, as a GradScaler does"
    rules = failure.rules
    if failure.overflows < (rules.collapse_after if failure.finite_before else rules.search_steps):
        return _verdict(failure, "amp_overflow", line)
    return _verdict(failure, "amp_scale_collapse", line, variant="skipped")


def _loss_scale_collapsed(failure: FailureFacts) -> Verdict | None:
    # Detection does not report the overflows of a scaler that still finds its scale.
    return _verdict(failure, "amp_scale_collapse") if failure.bad.overflow else None


def _never_finite(failure: FailureFacts) -> Verdict | None:
    if failure.finite_before or failure.bad.step > 1:
        return None
    return _verdict(failure, "first_step_nonfinite", "no earlier step of this attempt was finite")


def _too_few_steps(failure: FailureFacts) -> Verdict | None:
    before = failure.bad.sequence - 1
    if before >= _FEWEST_STEPS or failure.rank is not None:
        return None
    return _verdict(failure, "unknown", variant="too few", before=counted(before, "step"))


def _records_too_sparse(failure: FailureFacts) -> Verdict | None:
    if failure.apart < failure.rules.sparse_steps:
        return None
    return _verdict(failure, "unknown", f"the previous record is {failure.apart:g} steps older")


def _loss_diverged(failure: FailureFacts) -> Verdict | None:
    # Without norms from before clipping, a spike of the loss is the only possible sign of a climb.
    has_norms = failure.has_norms and failure.clipped_at is None
    if not failure.diverging and (has_norms or failure.loss_spike is None):
        return None
    return _verdict(failure, "nonfinite_divergence", _calm_before(failure), "the loss had been climbing")


def _loss_not_finite(failure: FailureFacts) -> Verdict | None:
    if failure.loss_is_finite:
        return None
    variant = "" if failure.rank is None else "one rank"
    return _verdict(failure, "sudden_nonfinite", _calm_before(failure), variant=variant)


def _gradient_not_finite(failure: FailureFacts) -> Verdict:
    cause: Cause = "nonfinite_gradient" if failure.rank is None else "bad_rank"
    return _verdict(failure, cause, _calm_before(failure), "the loss was finite")


_RULES: tuple[Callable[[FailureFacts], Verdict | None], ...] = (
    _one_rank_blew_up,
    _gradients_exploded,
    _loss_exploded_in_that_step,
    _scaler_skipped_overflows,
    _loss_scale_collapsed,
    _never_finite,
    _too_few_steps,
    _records_too_sparse,
    _loss_diverged,
    _loss_not_finite,
    _gradient_not_finite,
)
"""In order. The last one always applies."""


def _calm_before(failure: FailureFacts) -> str:
    if failure.clipped_at is not None:
        return after_clipping(failure.clipped_at)
    if not failure.has_norms:
        return "no gradient norm was recorded"
    return f"no spike or build-up in the {failure.rules.lead_steps} steps before"


def _verdict(
    failure: FailureFacts, cause: Cause, *evidence: str, rank: int | None = None, variant: str = "", **values: object
) -> Verdict:
    bad = failure.bad
    rank = failure.rank if rank is None else rank
    parameter, layer = failure.parameter_and_layer
    return make_verdict(
        cause,
        variant=variant,
        attempt=bad.attempt,
        step=bad.step,
        evidence=[*failure.evidence, *evidence],
        rank=rank,
        parameter=parameter,
        layer=layer,
        confidence=None if rank is None else _ONE_RANK_CONFIDENCE,
        what="loss" if bad.nan_loss or bad.inf_loss else "gradient",
        loss_scale=bad.loss_scale,
        **values,
    )
