"""The likely root of exploding gradients, and what to try against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.verdicts import Root
from foreshock_collector.records.steps import ModelFacts, Step

USUAL_STEPS = 50
"""Steps before a climb that show what is usual."""
_EARLY_STEPS = 40
"""A climb that begins within this many steps, at a steady learning rate, has been there from the start."""
_LARGE_NORM, _LARGE_LOSS = 50.0, 30.0
"""A first step beyond these values points to the initial weights: the norm usually starts at about 1 to 10, and no
cross entropy starts above 30."""
_RISING = 1.2
"""A learning rate is rising if it is this many times its minimum over the steps before the climb."""
_DEEP_LAYERS = 8
"""A model with at least so many layers is deep."""
_LEAST_OF_HEALTHY = 0.01
"""Smallest sensible max_norm, as a fraction of the median norm of healthy steps."""
_TINY_NORM = 1e-3
"""A smaller max_norm is not worth recommending: it reflects how the loss is scaled, not the training."""
_PLAIN_RECURRENT = ("RNN", "RNNCell")
_RECURRENT = (*_PLAIN_RECURRENT, "LSTM", "GRU", "LSTMCell", "GRUCell")
_NORMALIZATIONS = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "SyncBatchNorm")


def likely_root(steps: Sequence[Step], onset: Event, model: ModelFacts) -> Root:
    """Return the first root that the records point to."""
    before = [s.learning_rate for s in steps if 0 <= onset.sequence - s.sequence <= USUAL_STEPS]
    rates = [rate for rate in before if math.isfinite(rate)]
    if rates and rates[-1] > _RISING * min(rates):
        return "learning_rate"
    types = model.module_types
    early = onset.sequence <= _EARLY_STEPS and steps[0].sequence == 1
    deep = len(model.layers) >= _DEEP_LAYERS and not any(name.startswith(_NORMALIZATIONS) for name in types)
    first = steps[0]
    if early and not deep and (first.global_norm > _LARGE_NORM or (first.loss or 0.0) > _LARGE_LOSS):
        return "initialization"
    if any(name in types for name in _PLAIN_RECURRENT):
        return "recurrent"
    if deep:
        return "normalization"
    if early and rates:
        return "learning_rate"
    return "recurrent" if any(name in types for name in _RECURRENT) else "unknown"


def against_explosion(
    steps: Sequence[Step], onset: Event, usual: float, layer: str, model: ModelFacts, root: Root
) -> tuple[str, ...]:
    """Return what to try after an explosion, starting with its likely root. usual: the norm before the onset."""
    last = steps[-1]
    types = model.module_types
    rate = f" (it was {last.learning_rate:.3g})" if math.isfinite(last.learning_rate) else ""
    rates = [step.learning_rate for step in steps if math.isfinite(step.learning_rate)]
    rising = bool(rates) and last.learning_rate > _RISING * min(rates)
    slower = f"a smaller learning rate{rate}, {'or a slower' if rising else 'with a'} warm-up"
    recurrent = (
        "LSTM or GRU in place of the plain RNN, and truncated backpropagation through time"
        if any(name in types for name in _PLAIN_RECURRENT)
        else "truncated backpropagation through time: detach the state more often"
    )
    normalized = any(name.startswith(_NORMALIZATIONS) for name in types)
    normalization = "a normalization (LayerNorm, RMSNorm): the model has none"
    structure: list[str] = []
    if any(name in types for name in _RECURRENT):
        structure.append(recurrent)
    if types and not normalized:
        structure.append(normalization)
    clip = _clip_near(steps, onset, usual)
    back = "go back to a checkpoint from before the first sign"
    if root == "learning_rate":
        return (slower, clip, back)
    if root == "unknown":
        return (clip, slower, *structure, back)
    where = f", of {layer} first" if layer else ""
    remedy = {
        "initialization": f"a smaller initialization{where}: check how its weights are scaled",
        "recurrent": recurrent,
        "normalization": normalization,
    }[root]
    return (remedy, clip, slower, *(line for line in structure if line != remedy), back)


def _clip_near(steps: Sequence[Step], onset: Event, usual: float) -> str:
    """Recommend a max_norm: the usual norm, but not far below that of healthy steps if it had faded to almost zero."""
    if any(step.clip_coefficient < 1 for step in steps):
        return "clip lower: clipping was on and did not prevent it"
    norms = [step.global_norm for step in steps if step.sequence < onset.sequence]
    healthy = [norm for norm in norms if math.isfinite(norm) and norm > 0]
    least = _LEAST_OF_HEALTHY * median(healthy) if healthy else 0.0
    near = max(usual, least) if math.isfinite(usual) else least
    if near < _TINY_NORM:
        return (
            f"clip near the usual norm (about {near:.1g})"
            if near > 0
            else "clip by norm, near the norm of healthy steps"
        )
    return f"clip by norm, near the usual one: foreshock.attach(model, optimizer, clip={float(f'{near:.1g}'):g})"
