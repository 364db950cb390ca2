"""Whether a trace shows what its case was made for, judged by the numbers alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.faults.traces import Trace
from foreshock_collector.records.batch import locally_nonfinite, observed


def bad_steps(trace: Trace) -> NDArray[np.bool_]:
    """Steps with a loss or a gradient that is not finite, on any rank."""
    rows = trace.records
    bad = locally_nonfinite(rows) | (~np.isfinite(rows["global_norm"]))
    bad |= (rows["global_nan_parameters"] > 0) | (rows["global_inf_parameters"] > 0)
    found: NDArray[np.bool_] = (bad & (rows["sequence"] > 0)).any(axis=1)
    return found


def disagreement(trace: Trace) -> str | None:
    """What is wrong with it; None if nothing is."""
    case, bad = trace.case, bad_steps(trace)
    first = int(bad.argmax()) if bad.any() else None
    length = len(trace.records)
    if len(trace.starts) != 1 + len(case.relaunches):
        return f"{len(trace.starts)} attempts"
    missing = not (observed(trace.records) | (trace.records["sequence"] == 0)).all()
    if missing != (case.cause == "missing_loss"):
        return "a loss is missing" if missing else "no loss is missing"
    if case.kind == "recovering" and case.cause != "amp_overflow":
        return _short(case.steps, length)
    if case.kind == "healthy":
        return f"not finite at step {first}" if first is not None else _short(case.steps, length)
    if case.cause in ("exploding_gradients", "first_step_nonfinite", "sudden_nonfinite", "bad_rank"):
        if first is None:
            return "everything is finite"
        wanted = case.at if case.fault not in _BY_SETTINGS else None
        late = 1 if case.fault == "bit_flip" else 0
        return f"not finite at step {first}" if wanted is not None and not wanted <= first <= wanted + late else None
    if case.cause in ("amp_scale_collapse", "amp_overflow"):
        return "everything is finite" if first is None else None
    if case.cause in ("rank_lost", "stalled"):
        return None if length >= case.at - 1 else f"only {length} steps"
    if case.cause == "healthy":
        return _short(case.steps, length)
    return f"not finite at step {first}" if first is not None else _short(case.steps, length)


_BY_SETTINGS = (
    "rate_jump",
    "rate_ramp",
    "rate_runaway",
    "late_jump",
    "zero_loss_jump",
    "rollback_jump",
    "relaunch_jump",
    "no_warm_up",
    "large_initialisation",
    "no_normalisation",
    "long_sequence",
)
"""Faults that take effect gradually."""


def _short(wanted: int, length: int) -> str | None:
    return None if length >= wanted else f"{length} steps of {wanted}"
