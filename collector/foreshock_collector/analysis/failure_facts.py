"""What is known about a failure: its first non-finite step, the signs before it, and what each rank recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.records.batch import locally_nonfinite
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts, Step

_CLIPPED_ALIKE = 1e-3
"""Largest difference of norms clipped to the same value, relative to it: logs round."""
_VALUE_NAMES = {"nan": "NaN", "inf": "Inf"}


@dataclass(frozen=True, kw_only=True)
class FailureFacts:
    """Collects the facts about one failure; what follows from them is computed once."""

    steps: Sequence[Step]
    """The newest steps of one attempt, in order; the last one is the first that was not finite."""
    events: Sequence[Event]
    """Events of the same attempt."""
    buffer: RecordBuffer
    """Holds what each rank recorded of these steps."""
    model: ModelFacts
    rules: Rules
    finite_before: bool
    """Whether the attempt ever made a finite step, among `steps` or before."""
    climbing: int
    """Sequence number of the last step that belonged to a build-up; 0 if none did."""
    apart: float
    """Steps between the last two records."""
    overflows: int
    """Non-finite gradients in a row from this step on whose loss stays finite: a GradScaler skipped their steps."""
    diverging: bool
    """Whether the loss had been climbing for long at a calm norm."""

    @property
    def bad(self) -> Step:
        """The first non-finite step."""
        return self.steps[-1]

    @property
    def loss_is_finite(self) -> bool:
        """Whether a loss was observed at that step, and was finite."""
        return self.bad.loss is not None and math.isfinite(self.bad.loss)

    @property
    def loss_is_nonfinite(self) -> bool:
        """Whether a loss was observed at that step, and was NaN or Inf."""
        return self.bad.loss is not None and not math.isfinite(self.bad.loss)

    @property
    def has_norms(self) -> bool:
        """Whether any step has a gradient norm."""
        return any(not math.isnan(step.global_norm) for step in self.steps)

    @cached_property
    def clipped_at(self) -> float | None:
        """The value at which the norms of a log were clipped before they were logged; None if they were not."""
        # Of a live run, the probe measures norms before they are clipped.
        return None if self.buffer.highest else clipped_norm([step.global_norm for step in self.steps], self.rules)

    @cached_property
    def signs(self) -> list[Event]:
        """Spikes and build-ups that belong to the failure: those shortly before, and a climb that lasted until then."""
        first = self.bad.sequence - self.rules.lead_steps
        build_ups = [event.sequence for event in self.events if event.kind == "build_up"]
        if build_ups and self.climbing >= first:
            first = min(first, build_ups[-1])
        signs = [
            event
            for event in self.events
            if event.kind in ("spike", "build_up") and first <= event.sequence < self.bad.sequence
        ]
        return signs or self._signs_of_a_young_run()

    @property
    def onset(self) -> Event:
        """The first sign. There must be one."""
        return min(self.signs, key=lambda sign: sign.sequence)

    @property
    def rank(self) -> int | None:
        """The single rank that was bad by itself, before the all-reduce mixed its gradient into the others."""
        return self._origin[0]

    @cached_property
    def parameter_and_layer(self) -> tuple[str, str]:
        """First non-finite parameter in backward order, and its layer; empty if unknown or meaningless."""
        if self.loss_is_nonfinite:
            # The backward pass starts at a non-finite loss, so every gradient is bad and the first means nothing.
            return "", ""
        ranks, rows = self.buffer.records(self.bad.sequence)
        if self.rank is not None and self.rank in ranks:
            rows = rows[ranks == self.rank]
        for name in ("first_nonfinite_local", "first_nonfinite_global"):
            found = rows[name][rows[name] >= 0]
            if found.size:
                return self.model.parameter(int(found[0]))
        return "", ""

    @cached_property
    def loss_spike(self) -> Event | None:
        """The first spike of the loss shortly before the failure."""
        for event in self.events:
            if event.kind == "loss_spike" and 0 < self.bad.sequence - event.sequence <= self.rules.lead_steps:
                return event
        return None

    @property
    def usual_loss(self) -> float | None:
        """Median loss of the steps shortly before; None if none is known."""
        before = [step.loss for step in self.steps[-1 - self.rules.lead_steps : -1]]
        finite = [loss for loss in before if loss is not None and math.isfinite(loss)]
        return float(np.median(finite)) if finite else None

    @property
    def evidence(self) -> list[str]:
        """What was seen, whatever the cause."""
        bad = self.bad
        values = ", ".join(f"{source} {_VALUE_NAMES[kind]}" for source, kind in bad.nonfinite)
        lines = [f"step {bad.step}: {values}", *self._origin[1]]
        parameter, _ = self.parameter_and_layer
        if self.loss_is_nonfinite:
            lines.append("the loss itself was not finite, so the failure began in the forward pass")
        elif parameter:
            lines.append(f"first non-finite parameter in backward order: {parameter}")
        spike = self.loss_spike
        if spike is not None:
            lines.append(f"the loss spiked at step {spike.step}: {spike.value:.3g}, usually {spike.usual:.3g}")
        return lines

    def _signs_of_a_young_run(self) -> list[Event]:
        """Spikes at the end of a run that failed before it had a history to detect them by."""
        steps, rules = self.steps, self.rules.gradient
        norms = [step.global_norm for step in steps[:-1]]
        if steps[0].sequence > 1 or not 2 <= len(norms) <= rules.ready_after or not np.isfinite(norms).all():
            return []
        usual = float(np.median(norms[:-1]))
        if norms[-1] < math.exp(rules.steep_rise) * usual:
            return []
        # In a run of two steps the first one is the usual, and no step stands above it but the last.
        high = [s for s in steps[1:-1] if s.global_norm > math.exp(rules.spike_rise) * usual] or [steps[-2]]
        return [
            Event(
                kind="spike",
                attempt=step.attempt,
                sequence=step.sequence,
                step=step.step,
                score=rules.spike_z,
                value=step.global_norm,
                usual=usual,
            )
            for step in high
        ]

    @cached_property
    def _origin(self) -> tuple[int | None, list[str]]:
        """The single bad rank, and the evidence on where the failure began."""
        if not self.buffer.highest:
            return None, []  # a recorded log has no ranks
        ranks, rows = self.buffer.records(self.bad.sequence)
        world = len(self.buffer.positions)
        bad = ranks[locally_nonfinite(rows)]
        evidence = [] if len(ranks) == world else [f"{len(ranks)} of {world} ranks have reported step {self.bad.step}"]
        if len(bad) == 1 and world > 1:
            return int(bad[0]), [*evidence, f"before the all-reduce only rank {bad[0]} was not finite"]
        if len(bad) > 1:
            return None, [*evidence, f"{len(bad)} of {len(ranks)} ranks were not finite before the all-reduce"]
        sums = self.buffer.sums(self.bad.sequence)
        missing = np.setdiff1d(np.arange(world), ranks)
        if sums is not None and sums["reduced_nan_ranks"] + sums["reduced_inf_ranks"] == 1 == len(missing):
            line = f"one rank was not finite, and only rank {missing[0]} has not reported"
            return int(missing[0]), [*evidence, line]
        return None, evidence


def clipped_norm(norms: Sequence[float] | NDArray[np.float64], rules: Rules) -> float | None:
    """Return the norm that at least half of the steps have and none exceeds: they were logged after clipping. None
    without such a norm.
    """
    finite = np.asarray(norms, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < rules.gradient.ready_after:
        return None
    largest = float(finite.max())
    return largest if largest > 0 and (finite > largest * (1 - _CLIPPED_ALIKE)).mean() >= 0.5 else None


def after_clipping(norm: float) -> str:
    """Return the evidence that norms were logged after they were clipped to this value."""
    return f"the norms were logged after clipping, at {norm:.3g}: they cannot show a climb"
