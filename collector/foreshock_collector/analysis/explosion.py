"""The verdict on exploding gradients: from which step on, on which rank and layer, and from which root."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from foreshock_collector.analysis.advice import USUAL_STEPS, against_explosion, likely_root
from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.failure_facts import FailureFacts
from foreshock_collector.analysis.verdicts import Verdict, make_verdict
from foreshock_collector.analysis.weight_signs import weight_evidence
from foreshock_collector.records.steps import Step

_BLOWN_RATIO = 1000.0
"""A rank whose norm is this many times the largest of the others has a fault of its own: no batch makes so much."""
_LEADING_RATIO, _LEADING_RATIO_OF_ONE_STEP = 3.0, 10.0
"""A rank leads a climb if its local norm is this many times the median of the others: differences between batches make
less. A climb of a single step needs more, because chance makes more of it."""
_RISING_RATE = 1.01


def blown_rank(failure: FailureFacts) -> int | None:
    """Return the rank whose own norm blew up at the onset while no other did: data and weights blow up on all."""
    (norms,) = failure.buffer.local_norms(np.array([failure.onset.sequence], np.int64))
    if len(norms) < 2 or np.isnan(norms).any():
        return None
    largest = int(norms.argmax())
    others = np.delete(norms, largest)
    return largest if norms[largest] > _BLOWN_RATIO * float(others.max()) else None


def explosion(failure: FailureFacts) -> Verdict:
    """Return the verdict on a failure with signs before it."""
    bad, onset, signs = failure.bad, failure.onset, failure.signs
    lead = bad.sequence - onset.sequence
    window = [step for step in failure.steps if step.sequence >= onset.sequence - USUAL_STEPS]
    usual, peak = _usual_and_peak(failure)
    spikes = sum(sign.kind == "spike" for sign in signs)
    build_ups = len(signs) - spikes
    evidence = [
        f"global norm about {usual:.3g} until step {onset.step}, then up to {peak:.3g}",
        *failure.evidence,
        f"{counted(spikes, 'spike')} and {counted(build_ups, 'build-up')} in the {counted(lead, 'step')} before",
    ]
    parameter, layer = failure.parameter_and_layer
    growing, growth = _growing_layer(failure, window)
    if growing:
        evidence.append(f"layer {growing} grew most: {growth:.3g} times its earlier norm")
    evidence += weight_evidence(failure)
    rank, alike = failure.rank, False
    if rank is None:
        rank, share, alike = _leading_rank(failure, window)
        if rank is not None:
            evidence.append(f"local norm of rank {rank}: {share:.3g} times the median of the others")
    rates = [step.learning_rate for step in window]
    if rates and rates[-1] > _RISING_RATE * min(rates):
        evidence.append(f"the learning rate was rising, from {min(rates):.3g} to {rates[-1]:.3g}")
    verdict = make_verdict(
        "exploding_gradients",
        variant="single spike" if spikes == 1 and not build_ups else "",
        attempt=bad.attempt,
        step=bad.step,
        evidence=evidence,
        rank=rank,
        parameter=parameter,
        layer=layer or growing,
        onset=onset.step,
        usual=usual,
        peak=peak,
        lead=counted(lead, "step"),
    )
    root = likely_root(failure.steps, onset, failure.model)
    return replace(
        verdict,
        onset_step=onset.step,
        lead_steps=lead,
        try_=against_explosion(failure.steps, onset, usual, layer or growing, failure.model, root),
        ranks_alike=alike,
        likely_root=root,
    )


def explosion_in_one_step(failure: FailureFacts, usual: float) -> Verdict:
    """Return the verdict on a failure without signs before it, whose finite loss shows the explosion in that very step.

    usual: the loss of the steps before.
    """
    bad = failure.bad
    loss = math.nan if bad.loss is None else bad.loss
    here = Event(kind="spike", attempt=bad.attempt, sequence=bad.sequence, step=bad.step, score=0.0)
    root = likely_root(failure.steps, here, failure.model)
    verdict = make_verdict(
        "exploding_gradients",
        variant="in one step",
        attempt=bad.attempt,
        step=bad.step,
        evidence=[*failure.evidence, f"the loss is {loss / usual:.3g} times that of the steps before"],
        usual=usual,
        peak=loss,
    )
    advice = against_explosion(failure.steps, here, math.nan, "", failure.model, root)
    return replace(verdict, onset_step=bad.step, likely_root=root, try_=advice)


def counted(count: int, what: str) -> str:
    """Return a count with its noun, such as "1 step" or "3 steps"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _usual_and_peak(failure: FailureFacts) -> tuple[float, float]:
    """Return the usual norm before the onset, and the largest finite one since."""
    onset = failure.onset
    finite = [step for step in failure.steps if math.isfinite(step.global_norm)]
    calm = [step.global_norm for step in finite if step.sequence < onset.sequence]
    climb = [step.global_norm for step in finite if step.sequence >= onset.sequence]
    # A median lags behind a norm that has been falling.
    usual = onset.usual or (float(np.median(calm[-USUAL_STEPS:])) if calm else math.nan)
    return usual, max(climb, default=0.0)


def _growing_layer(failure: FailureFacts, window: Sequence[Step]) -> tuple[str, float]:
    """Return the layer whose norm grew most from before the onset to the last finite step, and how many times."""
    model, onset = failure.model, failure.onset
    known = [(s.sequence, norms) for s in window if (norms := failure.buffer.layer_norms(s.sequence)) is not None]
    known = [(sequence, norms) for sequence, norms in known if np.isfinite(norms).all()]
    before = [norms for sequence, norms in known if sequence < onset.sequence]
    after = [norms for sequence, norms in known if sequence >= onset.sequence]
    if not before or not after or not len(after[-1]) or len(after[-1]) != len(model.layers):
        return "", 0.0
    usual = np.median(np.array(before[-USUAL_STEPS:], np.float64), axis=0)
    # A layer without a gradient has not grown, whatever follows.
    growth = np.divide(after[-1], usual, out=np.zeros_like(usual), where=usual > 0)
    most = int(growth.argmax())
    return (model.layers[most], float(growth[most])) if growth[most] > 1 else ("", 0.0)


def _leading_rank(failure: FailureFacts, window: Sequence[Step]) -> tuple[int | None, float, bool]:
    """Return the rank that led the climb, how many times the median of the others its norm was, and whether all ranks
    are known to have climbed alike.

    A rank leads if its own norm was far above the others' all the way from the onset. A rank that explodes together
    with the others has the largest norm by chance on some steps; one whose data always make more of it has not caused
    the climb.
    """
    sequences = np.array([step.sequence for step in window if not step.nonfinite], np.int64)
    norms = failure.buffer.local_norms(sequences)
    known = (np.isfinite(norms) & (norms > 0)).all(axis=1)
    multiples = multiples_of_others(norms[known])
    before = sequences[known] < failure.onset.sequence
    calm, climb = multiples[before], multiples[~before]
    if multiples.shape[1] < 2 or not len(climb):
        return None, 0.0, False
    ratio = _LEADING_RATIO if len(climb) > 1 else _LEADING_RATIO_OF_ONE_STEP
    largest = int(climb[-1].argmax())
    if climb[:, largest].min() > max(ratio, float(calm.max(initial=0.0))):
        return largest, float(climb[-1, largest]), False
    return None, 0.0, float(climb.max()) <= _LEADING_RATIO


def multiples_of_others(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return each rank's norm as a multiple of the median of the others. norms: positive and finite, [steps, ranks]."""
    others = norms.shape[1] - 1
    if others < 1:
        return np.ones(norms.shape)
    ordered = np.sort(norms, axis=1)
    position = norms.argsort(axis=1).argsort(axis=1)

    def without_itself(i: int) -> npt.NDArray[np.float64]:
        # For a rank that sorts before the i-th of the others, that one is one position further on.
        return np.where(position > i, ordered[:, [i]], ordered[:, [i + 1]])

    return 2 * norms / (without_itself((others - 1) // 2) + without_itself(others // 2))
