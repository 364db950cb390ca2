"""What the weights show of an explosion: how the updates grew, and how far the gradient outran the optimizer's moments.

Updates are measured on some steps only, so these are evidence and decide nothing. That the updates of Adam spike before
the loss does is what Molybog et al. describe ("A Theory on Adam Instability in Large-Scale Machine Learning", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from foreshock_collector.analysis.advice import USUAL_STEPS
from foreshock_collector.analysis.failure_facts import FailureFacts
from foreshock_collector.records.steps import Step

_RISEN_RATIO = 2.0
"""An update ratio has risen if it is this many times its median before: it changes slowly with weights and rate."""
_OUTRUN_RATIO = 3.0
"""A gradient has outrun the second moment if their ratio is this many times its median before."""
_FEWEST = 3
"""Measurements that make a median."""

Updates = Sequence[tuple[int, float]]
"""Sequence numbers of optimizer steps, ascending, and the ratio of the update that each has made."""


def weight_evidence(failure: FailureFacts) -> list[str]:
    """Return lines of evidence; none where nothing was measured, or nothing has risen. There must be an onset."""
    # A record holds what the optimizer step before it did.
    updates = [(step.sequence - 1, ratio) for step in failure.steps if (ratio := _measured(step, "update_ratio"))]
    before = [ratio for sequence, ratio in updates if sequence < failure.onset.sequence][-USUAL_STEPS:]
    lines = []
    if len(before) >= _FEWEST:
        usual = float(np.median(before))
        risen = [*takewhile(lambda update: update[1] > _RISEN_RATIO * usual, reversed(updates))][::-1]
        if risen:
            lines += [_rise(failure, usual, risen), *_growing_layer(failure, risen)]
    return lines + _outrun_moment(failure)


def _rise(failure: FailureFacts, usual: float, risen: Updates) -> str:
    at, peak = max(risen, key=lambda update: update[1])
    lead = failure.onset.sequence - risen[0][0]
    earlier = f"; it had risen {lead} step{'' if lead == 1 else 's'} before the first sign" if lead > 0 else ""
    # Labels of the script may skip numbers, those of the records do not.
    step = failure.bad.step - (failure.bad.sequence - at)
    return (
        f"the update ratio rose {peak / usual:.3g}-fold, from about {usual:.3g} to {peak:.3g} at step {step}{earlier}"
    )


def _growing_layer(failure: FailureFacts, risen: Updates) -> list[str]:
    """Return a line on the layer whose update ratio grew most."""
    weights = failure.buffer.weights.between(failure.steps[0].sequence, failure.bad.sequence)
    ratios = weights.block("update_layer_ratios")
    known = np.isfinite(ratios).any(axis=1)
    ratios, sequences = ratios[known], weights.sequences[known] - 1
    before, after = ratios[sequences < risen[0][0]][-USUAL_STEPS:], ratios[sequences >= risen[0][0]]
    if len(before) < _FEWEST or not len(after) or ratios.shape[1] != len(failure.model.layers):
        return []
    # A layer that was not measured or is not finite has not grown.
    usual = np.median(np.nan_to_num(before, posinf=0), axis=0)
    peaks = np.nan_to_num(after, posinf=0).max(axis=0)
    growth = np.divide(peaks, usual, out=np.zeros_like(usual), where=usual > 0)
    most = int(growth.argmax())
    if growth[most] <= _RISEN_RATIO:
        return []
    return [
        f"the updates of layer {failure.model.layers[most]} grew most: {growth[most]:.3g} times their earlier ratio"
    ]


def _outrun_moment(failure: FailureFacts) -> list[str]:
    """Return a line if the gradient at the onset was far above what the optimizer's second moment had averaged."""
    onset = next((step for step in failure.steps if step.sequence == failure.onset.sequence), None)
    measured = [step for step in failure.steps if _measured(step, "second_moment_norm")]
    known = [step for step in measured if step.sequence <= failure.onset.sequence]
    if onset is None or not known or not math.isfinite(onset.global_norm):
        return []
    # Relative to before, since the second moment is not corrected for its bias toward zero.
    before = [_applied_norm(step) / _measured(step, "second_moment_norm") for step in known if step is not onset]
    before = [ratio for ratio in before if math.isfinite(ratio)][-USUAL_STEPS:]
    ratio = _applied_norm(onset) / _measured(known[-1], "second_moment_norm")
    if len(before) < _FEWEST or ratio <= _OUTRUN_RATIO * float(np.median(before)):
        return []
    usual = float(np.median(before))
    what = f"the gradient norm at step {onset.step} was {ratio:.3g} times the root of the optimizer's second moment"
    return [f"{what}, usually {usual:.3g} times"]


def _applied_norm(step: Step) -> float:
    return step.global_norm * step.clip_coefficient


def _measured(step: Step, name: str) -> float:
    """Return what a step measured; 0 if nothing, or a value that is negative or not finite."""
    value = step.measurements.get(name, 0.0)
    return value if 0.0 < value < math.inf else 0.0
