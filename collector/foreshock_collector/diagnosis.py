"""Names the cause of a failure from the steps before it. Pure: no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foreshock_collector.detection import Event
from foreshock_collector.steps import ModelFacts, RankRow, Step

LEAD_STEPS = 32
"""How far before the first non-finite step a spike or build-up still belongs to it."""
_RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
_NORMALISATIONS = ("LayerNorm", "BatchNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
_OUTLIER_RATIO = 3.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened, where it began, and what to try."""

    cause: str
    attempt: int
    first_bad_step: int
    onset_step: int | None
    """First spike or build-up that belongs to the failure."""
    lead_steps: int
    """From the onset to the first non-finite step; 0 without one."""
    rank: int | None
    parameter: str
    layer: str
    confidence: float
    summary: str
    evidence: tuple[str, ...]
    try_: tuple[str, ...]
    alternatives: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For the API and the store."""
        values = asdict(self)
        values["try"] = values.pop("try_")
        return values


def diagnose(window: Sequence[Step], events: Sequence[Event], model: ModelFacts, *, finite_before: bool) -> Verdict:
    """The verdict on the last step of `window`, the run's first non-finite one.

    window: settled steps in order, with their ranks' rows. events: of the same steps. finite_before: the run had a
    finite step, also before the window.
    """
    bad = window[-1]
    signs = [
        e
        for e in events
        if e.kind in ("spike", "build_up") and e.attempt == bad.attempt and 0 < bad.step - e.step <= LEAD_STEPS
    ]
    rank, alone = _bad_rank(bad)
    parameter, layer = _where(bad, rank, model)
    evidence = [_bad_values(bad)]
    if alone:
        evidence.append(f"before the all-reduce only rank {rank} of {len(bad.ranks)} was not finite")
    if signs:
        onset = min(e.step for e in signs)
        norms = {s.step: s.global_norm for s in window}
        before = [s.global_norm for s in window if s.step < onset and math.isfinite(s.global_norm)]
        usual = sorted(before[-50:])[len(before[-50:]) // 2] if before else math.nan
        peak = max(norms.get(e.step, 0.0) for e in signs)
        evidence.insert(0, f"global norm about {usual:.3g} until step {onset}, then up to {peak:.3g}")
        evidence.append(f"{len(signs)} spikes or build-ups in the {bad.step - onset} steps before")
        layer = layer or _growing_layer(window, onset, model)
        rank = rank if alone else _loudest_rank(window, onset)
        return Verdict(
            cause="exploding_gradients",
            attempt=bad.attempt,
            first_bad_step=bad.step,
            onset_step=onset,
            lead_steps=bad.step - onset,
            rank=rank,
            parameter=parameter,
            layer=layer,
            confidence=0.9 if len(signs) > 1 else 0.7,
            summary=f"Gradients exploded: the norm rose from step {onset}, {bad.step - onset} steps before the first "
            f"non-finite value at step {bad.step}.",
            evidence=tuple(evidence),
            try_=_against_explosion(window, model),
            alternatives=("a single bad batch that the model could not digest",),
        )
    if not finite_before and bad.step <= 1:
        return Verdict(
            cause="first_step_nonfinite",
            attempt=bad.attempt,
            first_bad_step=bad.step,
            onset_step=None,
            lead_steps=0,
            rank=rank,
            parameter=parameter,
            layer=layer,
            confidence=0.9,
            summary=f"Not finite from the first step ({bad.step}) on: nothing has been learnt that could explode.",
            evidence=tuple(evidence),
            try_=(
                "check the data for missing values: torch.isfinite(batch).all()",
                "look for a division by zero, log(0), or a softmax that is not shifted, in model and loss",
                "check the initialisation and the dtype of the first layers",
            ),
            alternatives=("far too large an initialisation",),
        )
    where = f" on rank {rank}" if rank is not None else ""
    return Verdict(
        cause="sudden_nonfinite",
        attempt=bad.attempt,
        first_bad_step=bad.step,
        onset_step=None,
        lead_steps=0,
        rank=rank,
        parameter=parameter,
        layer=layer,
        confidence=0.9 if alone else 0.75,
        summary=f"A non-finite value came out of nothing at step {bad.step}{where}: the norm was quiet before.",
        evidence=(*evidence, f"no spike or build-up in the {LEAD_STEPS} steps before"),
        try_=(
            f"look at the batch of step {bad.step}{where}: NaN, Inf, or an empty or all-masked sample",
            "look for an unstable operation that this batch reached: division by zero, log(0), sqrt at 0",
            "if the same rank is named again with other data, suspect its hardware: run it on another node",
        ),
        alternatives=("a bad rank (hardware)", "overflow in half precision"),
    )


def _bad_values(bad: Step) -> str:
    parts = []
    if bad.loss is not None and not math.isfinite(bad.loss):
        parts.append("loss " + ("NaN" if math.isnan(bad.loss) else "Inf"))
    if bad.nan_gradient:
        parts.append("gradient NaN")
    if bad.inf_gradient:
        parts.append("gradient Inf")
    return f"step {bad.step}: " + ", ".join(parts)


def _bad_rank(bad: Step) -> tuple[int | None, bool]:
    """The one rank that was bad by itself, before the all-reduce mixed it into the others."""
    culprits = [rank for rank, row in sorted(bad.ranks.items()) if row.bad_locally]
    alone = len(culprits) == 1 and len(bad.ranks) > 1
    return (culprits[0] if alone else None), alone


def _where(bad: Step, rank: int | None, model: ModelFacts) -> tuple[str, str]:
    """First parameter in backward order that was not finite, on the bad rank or on any."""
    rows: list[RankRow] = [bad.ranks[rank]] if rank is not None else [row for _, row in sorted(bad.ranks.items())]
    for row in rows:
        if row.first_nonfinite_local >= 0:
            return model.parameter(row.first_nonfinite_local)
    for row in rows:
        if row.first_nonfinite_global >= 0:
            return model.parameter(row.first_nonfinite_global)
    return "", ""


def _growing_layer(window: Sequence[Step], onset: int, model: ModelFacts) -> str:
    """The layer whose norm grew most from the onset to the last finite step."""
    before = next((s for s in reversed(window) if s.step < onset and s.layer_norms), None)
    after = next((s for s in reversed(window[:-1]) if s.step >= onset and s.layer_norms), None)
    if before is None or after is None:
        return ""
    growth = [a / b if b > 0 else 0.0 for a, b in zip(after.layer_norms, before.layer_norms, strict=True)]
    return model.layers[growth.index(max(growth))] if growth else ""


def _loudest_rank(window: Sequence[Step], onset: int) -> int | None:
    """A rank whose own norm stands far above the others' at the onset."""
    step = next((s for s in window if s.step == onset), None)
    norms = {rank: row.local_norm for rank, row in step.ranks.items() if row.local_norm > 0} if step else {}
    if len(norms) < 2:
        return None
    (_, second), (rank, first) = sorted(norms.items(), key=lambda item: item[1])[-2:]
    return rank if first > _OUTLIER_RATIO * second else None


def _against_explosion(window: Sequence[Step], model: ModelFacts) -> tuple[str, ...]:
    last = window[-1]
    advice = ["clip by norm: foreshock.attach(model, optimizer, clip=1.0)"]
    if last.clip_coefficient < 1 or any(s.clip_coefficient < 1 for s in window):
        advice = ["a smaller max_norm: clipping was on and did not hold it"]
    advice.append(f"a smaller learning rate (it was {last.learning_rate:g}) with a warm-up over the first steps")
    if any(name in model.module_types for name in _RECURRENT):
        plain = "RNN" in model.module_types or "RNNCell" in model.module_types
        if plain:
            advice.append("LSTM or GRU in place of the plain RNN, or shorter sequences (truncated backpropagation)")
        else:
            advice.append("shorter sequences (truncated backpropagation through time)")
    elif not any(name.startswith(_NORMALISATIONS) for name in model.module_types):
        advice.append("normalisation (LayerNorm, RMSNorm): the model has none")
    advice.append("a smaller initialisation of the layer named above")
    return tuple(advice)
