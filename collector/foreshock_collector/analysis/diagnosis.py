"""Names the cause of a failure from the steps before it. Pure: no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from foreshock_collector.analysis.advice import USUAL_STEPS, after_quiet, against_explosion, likely_root
from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.analysis.verdicts import Cause, Verdict
from foreshock_collector.records.buffer import RecordBuffer, locally_nonfinite
from foreshock_collector.records.steps import ModelFacts, Step

_CONFIDENCE: dict[Cause, float] = {
    "unknown": 0.3,
    "nonfinite_divergence": 0.6,
    "amp_overflow": 0.7,
    "sudden_nonfinite": 0.75,
}
"""Where it is quiet before and no rank is named; by rule of thumb."""
_BLOWN_RATIO = 1000.0
"""A rank whose norm is this many times the largest of the others' has a fault of its own: no batch makes so much."""
_OUTLIER_RATIO, _LONE_OUTLIER_RATIO = 3.0, 10.0
"""A rank stands out whose local norm is this many times the median of the others; data alone make less of it. The
second where the climb is one step: chance makes more of that."""


def diagnose(
    steps: Sequence[Step],
    events: Sequence[Event],
    buffer: RecordBuffer,
    model: ModelFacts,
    *,
    finite_before: bool,
    climbing: int,
    apart: float = 1,
    left_out: int = 0,
    diverging: bool = False,
    rules: Rules = DEFAULT,
) -> Verdict:
    """The verdict on the last of `steps`, the first non-finite one; `healthy` if that is finite.

    steps: the newest of one attempt, in order. events: of the same attempt. buffer: holds the ranks' records of these
    steps. finite_before: the attempt has had a finite step, be it among `steps` or before. climbing: sequence number of
    the last step that belonged to a build-up, 0 if none did. apart: steps from the record before to the last one.
    left_out: so many gradients in a row, from the last of `steps` on, were not finite while the loss stays so: a scaler
    has left their steps out. diverging: the loss has been climbing for long, at a calm norm.
    """
    bad = steps[-1]
    if not bad.nonfinite:
        return _healthy(bad)
    signs = _signs(bad, events, climbing, rules) or _early_signs(steps, rules)
    culprit, evidence = _culprit(bad, buffer)
    evidence.insert(0, _bad_values(bad))
    parameter, layer = _first_parameter(bad, culprit, buffer, model)
    if bad.loss is not None and not math.isfinite(bad.loss):
        # Backward starts at a loss that is not finite: every gradient is bad, and the first of them says nothing.
        evidence.append("the loss itself was not finite, so the trouble came up in the forward pass")
        parameter = layer = ""
    elif parameter:
        evidence.append(f"first in backward order: {parameter}")
    evidence += _loss_before(bad, events, rules)
    if signs:
        loud = None if culprit is not None else _lone_rank(signs, buffer)
        if loud is not None:
            evidence.append(f"at step {signs[0].step} the local norm of rank {loud} alone stood far above the others'")
            return _quiet_before("bad_rank", bad, evidence, loud, parameter, layer)
        return _exploded(steps, signs, evidence, culprit, parameter, layer, buffer, model)
    if left_out and not bad.overflow:
        collapsed = left_out >= rules.collapse_after
        evidence.append(f"the loss stays finite: {_counted(left_out, 'step')} left out, as a GradScaler does")
        cause: Cause = "amp_scale_collapse" if collapsed else "amp_overflow"
        return _quiet_before(cause, bad, evidence, culprit, parameter, layer)
    if bad.overflow:
        return _quiet_before("amp_scale_collapse", bad, evidence, culprit, parameter, layer)
    if not finite_before and bad.step <= 1:
        return _not_from_the_start(bad, evidence, culprit, parameter, layer)
    if apart >= rules.sparse_steps:
        evidence.append(f"the record before is {apart:g} steps older")
        return _quiet_before("unknown", bad, evidence, culprit, parameter, layer)
    if math.isnan(max((s.global_norm for s in steps if not math.isnan(s.global_norm)), default=math.nan)):
        evidence.append("no gradient norm was told")
        diverging |= bool(_loss_before(bad, events, rules))
    else:
        evidence.append(f"no spike or build-up in the {rules.lead_steps} steps before")
    if diverging:
        evidence.append("the loss had been climbing")
        return _quiet_before("nonfinite_divergence", bad, evidence, culprit, parameter, layer)
    if bad.loss is None or not math.isfinite(bad.loss):
        return _quiet_before("sudden_nonfinite", bad, evidence, culprit, parameter, layer)
    evidence.append("the loss was finite")
    cause = "nonfinite_gradient" if culprit is None else "bad_rank"
    return _quiet_before(cause, bad, evidence, culprit, parameter, layer)


def _healthy(last: Step) -> Verdict:
    return Verdict(
        cause="healthy",
        attempt=last.attempt,
        first_bad_step=-1,
        onset_step=None,
        lead_steps=0,
        rank=None,
        parameter="",
        layer="",
        confidence=1.0,
        summary=f"Everything is finite up to step {last.step}.",
        evidence=(),
        try_=(),
        alternatives=(),
    )


def _exploded(
    steps: Sequence[Step],
    signs: Sequence[Event],
    evidence: list[str],
    culprit: int | None,
    parameter: str,
    layer: str,
    buffer: RecordBuffer,
    model: ModelFacts,
) -> Verdict:
    bad = steps[-1]
    onset = min(signs, key=lambda sign: sign.sequence)
    lead = bad.sequence - onset.sequence
    window = [s for s in steps if s.sequence >= onset.sequence - USUAL_STEPS]
    climb = [s.global_norm for s in window if s.sequence >= onset.sequence and math.isfinite(s.global_norm)]
    calm = [s.global_norm for s in steps if s.sequence < onset.sequence and math.isfinite(s.global_norm)]
    usual = float(np.median(calm[-USUAL_STEPS:])) if calm else onset.usual or math.nan
    evidence.insert(0, f"global norm about {usual:.3g} until step {onset.step}, then up to {max(climb, default=0):.3g}")
    spikes = sum(sign.kind == "spike" for sign in signs)
    build_ups = len(signs) - spikes
    found = f"{_counted(spikes, 'spike')} and {_counted(build_ups, 'build-up')}"
    evidence.append(f"{found} in the {_counted(lead, 'step')} before")
    growing, growth = _growing_layer(window, onset, buffer, model)
    if growing:
        evidence.append(f"layer {growing} grew most: {growth:.3g} times its norm of before")
    loud, share, alike = (None, 0.0, False) if culprit is not None else _loudest_rank(window, onset, buffer)
    if loud is not None:
        evidence.append(f"local norm of rank {loud}: {share:.3g} times the median of the others")
    rates = [s.learning_rate for s in window]
    if rates and rates[-1] > 1.01 * min(rates):
        evidence.append(f"the learning rate was rising, from {min(rates):.3g} to {rates[-1]:.3g}")
    root = likely_root(steps, onset, model)
    lone = not build_ups and spikes == 1
    return Verdict(
        cause="exploding_gradients",
        attempt=bad.attempt,
        first_bad_step=bad.step,
        onset_step=onset.step,
        lead_steps=lead,
        rank=culprit if culprit is not None else loud,
        parameter=parameter,
        layer=layer or growing,
        confidence=0.6 if lone else 0.9,
        summary=f"Gradients exploded: from step {onset.step} the norm climbed from about {usual:.3g} to "
        f"{max(climb, default=0):.3g}, and {_counted(lead, 'step')} later, at step {bad.step}, "
        "it was no longer finite.",
        evidence=tuple(evidence),
        try_=against_explosion(steps, onset, usual, layer or growing, model, root),
        likely_root=root,
        ranks_alike=alike,
        alternatives=("the one spike was harmless, and the NaN sudden",) if lone else ("one bad batch set it off",),
    )


def _not_from_the_start(bad: Step, evidence: list[str], culprit: int | None, parameter: str, layer: str) -> Verdict:
    where = "" if culprit is None else f" on rank {culprit}"
    return Verdict(
        cause="first_step_nonfinite",
        attempt=bad.attempt,
        first_bad_step=bad.step,
        onset_step=None,
        lead_steps=0,
        rank=culprit,
        parameter=parameter,
        layer=layer,
        confidence=0.9,
        summary=f"Not finite from the very first step ({bad.step}){where}: no training has made it so.",
        evidence=(*evidence, "no step of this attempt was finite before"),
        try_=(
            f"check the first batch{where} for NaN and Inf: torch.isfinite(batch).all()",
            "look for log(0), sqrt at 0, a division by zero or an all-masked softmax in the model and the loss",
            "check the initialization: its scale, and whether a loaded checkpoint is finite",
            "check the data type: what float16 cannot hold, bfloat16 or float32 may",
        ),
        alternatives=("an initialization so large that the first forward pass overflows",),
    )


def _quiet_before(
    cause: Cause, bad: Step, evidence: list[str], culprit: int | None, parameter: str, layer: str
) -> Verdict:
    where = "" if culprit is None else f" on rank {culprit}"
    first = "loss" if bad.nan_loss or bad.inf_loss else "gradient"
    summary = {
        "sudden_nonfinite": f"The {first} was suddenly not finite at step {bad.step}{where}; all was quiet before.",
        "nonfinite_gradient": f"The gradient was not finite at step {bad.step}, though the loss was.",
        "bad_rank": f"The gradient of rank {culprit} alone went wrong by step {bad.step}, though its loss had not.",
        "amp_scale_collapse": f"The gradient still overflows at step {bad.step}, with the loss scale down to "
        f"{bad.loss_scale:g}."
        if bad.overflow
        else f"From step {bad.step} on the gradient overflows again and again, and every step is left out.",
        "amp_overflow": f"The gradient overflowed at step {bad.step}, the step was left out, and training went on: "
        "that is how a GradScaler finds its scale.",
        "nonfinite_divergence": f"The loss climbed until it was no longer finite at step {bad.step}; "
        "no gradient build-up was seen.",
        "unknown": f"Not finite at step {bad.step}; the records are too sparse to tell what came before.",
    }[cause]
    return Verdict(
        cause=cause,
        attempt=bad.attempt,
        first_bad_step=bad.step,
        onset_step=None,
        lead_steps=0,
        rank=culprit,
        parameter=parameter,
        layer=layer,
        confidence=_CONFIDENCE.get(cause, 0.8) if culprit is None else 0.9,
        summary=summary,
        evidence=tuple(evidence),
        try_=after_quiet(cause, bad, culprit, where),
        alternatives={
            "sudden_nonfinite": ("overflow in half precision" if culprit is None else "a faulty device of that rank",),
            "amp_overflow": ("one bad batch, whose step was left out",),
            "nonfinite_divergence": ("gradients exploded between two records",),
            "bad_rank": ("an operation that this rank's batch made unstable in backward",),
            "nonfinite_gradient": ("a fault in the all-reduce or in a compression hook",),
        }.get(cause, ()),
    )


def _signs(bad: Step, events: Sequence[Event], climbing: int, rules: Rules) -> list[Event]:
    """Spikes and build-ups that belong to the failure: those shortly before, and a climb that lasted until then."""
    first = bad.sequence - rules.lead_steps
    build_ups = [e.sequence for e in events if e.kind == "build_up"]
    if build_ups and climbing >= first:
        first = min(first, build_ups[-1])
    return [e for e in events if e.kind in ("spike", "build_up") and first <= e.sequence < bad.sequence]


def _early_signs(steps: Sequence[Step], rules: Rules) -> list[Event]:
    """Of a run that ends before its history can judge: the steps at its end that stand far above those before."""
    norms = [s.global_norm for s in steps[:-1]]
    if steps[0].sequence > 1 or not 2 <= len(norms) <= rules.gradient.ready_after or not np.isfinite(norms).all():
        return []
    usual = float(np.median(norms[:-1]))
    if norms[-1] < math.exp(rules.gradient.steep_rise) * usual:
        return []
    # The first is the usual of a run of two steps.
    high = [s for s in steps[1:-1] if s.global_norm > math.exp(rules.gradient.spike_rise) * usual] or [steps[-2]]
    return [
        Event(
            kind="spike",
            attempt=s.attempt,
            sequence=s.sequence,
            step=s.step,
            score=rules.gradient.spike_z,
            value=s.global_norm,
            usual=usual,
        )
        for s in high
    ]


def _lone_rank(signs: Sequence[Event], buffer: RecordBuffer) -> int | None:
    """The one rank whose own norm blew up where the trouble began: data and weights blow up on all."""
    onset = min(signs, key=lambda sign: sign.sequence)
    (norms,) = buffer.local_norms(np.array([onset.sequence], np.int64))
    if len(norms) < 2 or np.isnan(norms).any():
        return None
    loudest = int(norms.argmax())
    others = np.delete(norms, loudest)
    return loudest if norms[loudest] > _BLOWN_RATIO * float(others.max()) else None


def _bad_values(bad: Step) -> str:
    names = {"nan": "NaN", "inf": "Inf"}
    return f"step {bad.step}: " + ", ".join(f"{source} {names[kind]}" for source, kind in bad.nonfinite)


def _culprit(bad: Step, buffer: RecordBuffer) -> tuple[int | None, list[str]]:
    """The one rank that was bad by itself, before the all-reduce mixed it into the others; and what was seen of it."""
    ranks, rows = buffer.records(bad.sequence)
    world = len(buffer.positions)
    if not buffer.highest:
        return None, []  # a recorded log has no ranks
    culprits = ranks[locally_nonfinite(rows)]
    evidence = [] if len(ranks) == world else [f"{len(ranks)} of {world} ranks have told of step {bad.step}"]
    if len(culprits) == 1 and world > 1:
        return int(culprits[0]), [*evidence, f"before the all-reduce rank {culprits[0]} alone was not finite"]
    if len(culprits) > 1:
        return None, [*evidence, f"{len(culprits)} of {len(ranks)} ranks were not finite before the all-reduce"]
    sums = buffer.sums(bad.sequence)
    missing = np.setdiff1d(np.arange(world), ranks)
    if sums is not None and sums["reduced_nan_ranks"] + sums["reduced_inf_ranks"] == 1 == len(missing):
        return int(missing[0]), [*evidence, f"one rank was not finite, and only rank {missing[0]} has not told"]
    return None, evidence


def _first_parameter(bad: Step, culprit: int | None, buffer: RecordBuffer, model: ModelFacts) -> tuple[str, str]:
    ranks, rows = buffer.records(bad.sequence)
    if culprit is not None and culprit in ranks:
        rows = rows[ranks == culprit]
    for name in ("first_nonfinite_local", "first_nonfinite_global"):
        found = rows[name][rows[name] >= 0]
        if found.size:
            return model.parameter(int(found[0]))
    return "", ""


def _loss_before(bad: Step, events: Sequence[Event], rules: Rules) -> list[str]:
    spikes = [e for e in events if e.kind == "loss_spike" and 0 < bad.sequence - e.sequence <= rules.lead_steps]
    return [f"the loss spiked at step {e.step}: {e.value:.3g}, usually {e.usual:.3g}" for e in spikes[:1]]


def _growing_layer(window: Sequence[Step], onset: Event, buffer: RecordBuffer, model: ModelFacts) -> tuple[str, float]:
    """The layer whose norm grew most from before the onset to the last finite step, and how many times."""
    known = [(s.sequence, norms) for s in window if (norms := buffer.layer_norms(s.sequence)) is not None]
    known = [(sequence, norms) for sequence, norms in known if np.isfinite(norms).all()]
    before = [norms for sequence, norms in known if sequence < onset.sequence]
    after = [norms for sequence, norms in known if sequence >= onset.sequence]
    if not before or not after or not len(after[-1]) or len(after[-1]) != len(model.layers):
        return "", 0.0
    usual = np.median(np.array(before[-USUAL_STEPS:], np.float64), axis=0)
    # A layer without gradient has not grown, whatever follows.
    growth = np.divide(after[-1], usual, out=np.zeros_like(usual), where=usual > 0)
    most = int(growth.argmax())
    return (model.layers[most], float(growth[most])) if growth[most] > 1 else ("", 0.0)


def _loudest_rank(window: Sequence[Step], onset: Event, buffer: RecordBuffer) -> tuple[int | None, float, bool]:
    """A rank whose own norm stood far above the others' all the way from the onset, and how many times their median.

    Third: all ranks were seen to climb alike. A rank that explodes together with the others is louder than they by
    chance, on some steps; and one whose data always make more of it has not caused the climb.
    """
    sequences = np.array([s.sequence for s in window if not s.nonfinite], np.int64)
    norms = buffer.local_norms(sequences)
    known = (np.isfinite(norms) & (norms > 0)).all(axis=1)
    shares = _shares(norms[known])
    before = sequences[known] < onset.sequence
    calm, climb = shares[before], shares[~before]
    if shares.shape[1] < 2 or not len(climb):
        return None, 0.0, False
    ratio = _OUTLIER_RATIO if len(climb) > 1 else _LONE_OUTLIER_RATIO
    loudest = int(climb[-1].argmax())
    if climb[:, loudest].min() > max(ratio, float(calm.max(initial=0.0))):
        return loudest, float(climb[-1, loudest]), False
    return None, 0.0, float(climb.max()) <= _OUTLIER_RATIO


def _shares(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each rank's norm as a multiple of the median of the others'. norms: positive and finite, [steps, ranks]."""
    others = norms.shape[1] - 1
    if others < 1:
        return np.ones(norms.shape)
    ordered = np.sort(norms, axis=1)
    place = norms.argsort(axis=1).argsort(axis=1)

    def without_own(i: int) -> npt.NDArray[np.float64]:
        # The i-th of the others is one further on for whoever stands before it.
        return np.where(place > i, ordered[:, [i]], ordered[:, [i + 1]])

    return 2 * norms / (without_own((others - 1) // 2) + without_own(others // 2))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
