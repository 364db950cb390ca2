"""One launch of a run: its ranks, their records, and what the detectors know of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.departures import Departure
from foreshock_collector.analysis.detection import Detector, Failure
from foreshock_collector.analysis.faults import FaultDetector
from foreshock_collector.analysis.noise import NoiseScale
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.records.block import Block
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts, Step
from foreshock_collector.state.instances import Instance
from foreshock_protos.columns import WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb

WINDOW_STEPS = 512
"""Newest steps in memory, and those whose rank-level records outlive a restart."""
_MOST_LAYERS, _LAYER_STEPS = 16, 64
"""Layers that become series, and the steps by whose largest norms they are chosen: few, and seldom others."""
_WEIGHT_STEPS = 1600
"""Steps by whose largest update ratios layers are chosen: 64 measurements of a small model."""
Outcome = Literal["", "ended", "interrupted", "failed"]
"""How an attempt came to its end, where that has been decided."""


@dataclass(kw_only=True, eq=False)
class AttemptState:
    """Stored state of an attempt, in addition to its steps and instances."""

    started_seconds: float
    """Unix time; never before an attempt that it follows, even where the clock of its machine is behind."""
    detector: Detector = field(default_factory=Detector)
    faults: FaultDetector = field(default_factory=FaultDetector)
    noise: NoiseScale = field(default_factory=NoiseScale)
    incidents: dict[str, int] = field(default_factory=dict)
    """Numbers of its open incidents, by the key that each is open under."""
    failure: Failure | None = None
    """The newest failure, and what was known before it."""
    departures_checked: int = 0
    """Ranks that left abnormally and have been explained."""
    silent: bool = False
    """Whether its ranks no longer report, though they have not left."""
    ending: str = ""
    """What ended it while it was failing already."""
    outcome: Outcome = ""
    finalized: int = 0
    """Sequence number up to which steps have been through detection."""
    inherited: ChannelState | None = None
    """Norms of the attempt that this one continues; None if it continues none."""


class Attempt(AttemptState):
    """Follows one launch of a run. What it adds to its state lives in memory only."""

    def __init__(self, number: int, hello: pb.Hello, state: AttemptState | None = None) -> None:
        """hello: the first that came of the launch. state: as it was stored; None: the attempt begins."""
        super().__init__(**vars(state or AttemptState(started_seconds=hello.started_seconds)))
        self.number = number
        self.hello = hello
        self.launch = hello.launch_id
        self.world_size = hello.topology.world_size
        self.model = ModelFacts.from_summary(hello.model)
        self.instances: dict[int, Instance] = {}
        """By rank."""
        self.superseded = False
        """Whether it alerts nobody: a later attempt makes steps, or its ranks had left before they first reported."""
        self.needs_reevaluation = False
        """Whether records of the step that failed have come since it was evaluated."""
        self.steps: deque[Step] = deque(maxlen=WINDOW_STEPS)
        """The newest steps, in order."""
        self._late_nonfinite: set[int] = set()
        """Sequence numbers of finalized steps of which a record has come since that is not finite."""
        self._buffer: RecordBuffer | None = None

    @property
    def buffer(self) -> RecordBuffer:
        """The ranks' newest records; made when they are needed, gone after `evict`."""
        if self._buffer is None:
            self._buffer = RecordBuffer(
                world_size=self.world_size, layers=len(self.model.layers), finalized=self.finalized
            )
            for instance in self.instances.values():
                # What lies between comes again from the store, and must then wait as it did before.
                self._buffer.positions[instance.rank] = min(instance.position, self.finalized)
        return self._buffer

    @property
    def idle(self) -> bool:
        """Whether no record waits for its step to be finalized."""
        return self._buffer is None or self._buffer.finalized == self._buffer.highest

    @property
    def evicted(self) -> bool:
        """Whether its records and steps are in the store alone."""
        return self._buffer is None

    @property
    def over(self) -> bool:
        """Whether all its ranks have left."""
        return bool(self.instances) and all(i.closed for i in self.instances.values())

    def ended_at(self, sequence: int) -> bool:
        """Whether a rank that made this step has left, uninterrupted; one that left before shows nothing of it."""
        ranks = self.instances.values()
        return any(i.ended not in ("", "INTERRUPTED") and i.position >= sequence for i in ranks)

    @property
    def handed_in(self) -> bool:
        """Whether all its ranks had left before their records reached the collector."""
        return all(i.gone for i in self.instances.values())

    def evict(self) -> None:
        """Free records and steps: the attempt has ended."""
        self._buffer = None
        self._late_nonfinite.clear()
        self.steps.clear()

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time by the collector's clock."""
        if self._buffer is not None:
            self._buffer.move_clock(seconds)
        for instance in self.instances.values():
            instance.last_report += seconds
            instance.left_seconds += seconds if instance.left_seconds else 0.0

    def departures(self) -> list[Departure]:
        """Ranks that left abnormally."""
        return [
            Departure(i.left_seconds, i.rank, i.last_step, i.ended or "LOST", i.detail)
            for i in self.instances.values()
            if i.left_seconds
        ]

    @property
    def departures_pending(self) -> bool:
        """Whether ranks left abnormally that have not been explained yet."""
        return self.departures_checked != sum(bool(i.left_seconds) for i in self.instances.values())

    def held_seconds(self) -> float:
        """Return for how long a step stays in the buffer, at the pace of the newest one; Inf if unknown."""
        seconds = self.steps[-1].duration_seconds if self.steps else None
        return math.inf if seconds is None or self._buffer is None else seconds * self._buffer.capacity

    def last_report(self) -> float:
        """When any of its ranks last reported."""
        return max((i.last_report for i in self.instances.values()), default=0.0)

    def write(self, instances: Sequence[Instance], block: Block, now: float) -> None:
        """Add records of these ranks to the buffer. The caller has made room."""
        sequences = block.sequences
        bad = sequences[block.nonfinite.any(axis=1)]
        self._late_nonfinite.update(bad[bad <= self.finalized].tolist())
        self.buffer.write_block([instance.rank for instance in instances], block, now)
        if self.failure is not None:
            first, last = int(sequences[0]), int(sequences[-1])
            self.needs_reevaluation |= first <= self.failure.sequence <= min(last, self.finalized)

    def reopen(self) -> list[Instance]:
        """Forget that its ranks had finished: it steps again. Return those that had."""
        finished = [instance for instance in self.instances.values() if instance.ended == "FINISHED"]
        for instance in finished:
            instance.reopen()
        return finished

    def norm_history(self, rules: Rules) -> pb.NormHistory:
        """Return the history of its norms, for an attempt that continues it. Count 0: none."""
        known = self.detector.gradient
        if not known.count or not rules.gradient.logarithmic:
            return pb.NormHistory()
        return pb.NormHistory(
            mean=known.mean,
            recent=known.recent,
            deviation=known.deviation,
            count=known.count,
            learning_rate=self.detector.rate or 0.0,
        )

    def largest_layers(self) -> list[tuple[str, float]]:
        """Names and newest finite norms of the layers that had the largest ones lately, in the model's order."""
        if self._buffer is None or not self.model.layers:
            return []
        first = max(1, self.finalized - _LAYER_STEPS + 1)
        norms = self._buffer.layer_norms_of(np.arange(first, self.finalized + 1))
        chosen = _largest(norms)
        newest = _newest_finite(norms)
        return [(self.model.layers[layer], float(newest[layer])) for layer in chosen]

    def layer_weights(self) -> dict[str, list[tuple[str, float]]]:
        """By block: names and newest finite values of the layers that had the largest update ratios lately.

        A block without a measurement is empty or missing; before the first update, the layers with the largest norms.
        """
        if self._buffer is None or not self.model.layers:
            return {}
        weights = self._buffer.weights.between(self.finalized - _WEIGHT_STEPS + 1, self.finalized)
        values = weights.values()
        ratios, norms = (
            values[:, WEIGHT_BLOCKS.index(name)] for name in ("update_layer_ratios", "parameter_layer_norms")
        )
        chosen = _largest(ratios) or _largest(norms)
        if not chosen:
            return {}
        names = [self.model.layers[layer] for layer in chosen]
        # Of all blocks at once: each call of numpy costs as much as its work here.
        newest = _newest_finite(values.reshape(len(values), -1)).reshape(len(WEIGHT_BLOCKS), -1)[:, chosen].tolist()
        return {
            block: [(name, value) for name, value in zip(names, each, strict=True) if math.isfinite(value)]
            for block, each in zip(WEIGHT_BLOCKS, newest, strict=True)
        }

    def due(self, now: float) -> int:
        """Sequence number up to which steps may be finalized."""
        buffer = self.buffer
        for instance in self.instances.values():
            buffer.awaited[instance.rank] = not (instance.leaving or instance.closed)
        # Not one before the first record that came: its ring no longer has those.
        gaps = [i.gaps[0][0] for i in self.instances.values() if i.gaps and buffer.awaited[i.rank] and i.gaps[0][0] > 1]
        return buffer.due(now, whole=min(gaps) - 1 if gaps else None)

    def assemble(self, upto: int) -> Iterator[Step]:
        """Yield steps that are due, in order. After an error, what follows may still be asked for."""
        buffer = self.buffer
        try:
            for step in buffer.finalize(self.number, upto):
                self.steps.append(step)
                yield step
        finally:
            self.finalized = buffer.finalized

    def revised_steps(self) -> Iterator[tuple[Step, list[tuple[str, str]]]]:
        """Yield finalized steps that are now known to be not finite, each with what was not known of it."""
        late, self._late_nonfinite = self._late_nonfinite, set()
        for place in [place for place, step in enumerate(self.steps) if step.sequence in late] if late else ():
            step = self.steps[place]
            again = self.buffer.assembled_again(self.number, step.sequence)
            found = [] if again is None else [each for each in again.nonfinite if each not in step.nonfinite]
            if again is not None and found:
                self.steps[place] = revised = msgspec.structs.replace(
                    step,
                    loss=again.loss if again.nan_loss or again.inf_loss else step.loss,
                    nan_loss=step.nan_loss or again.nan_loss,
                    inf_loss=step.inf_loss or again.inf_loss,
                    nan_gradient=step.nan_gradient or again.nan_gradient,
                    inf_gradient=step.inf_gradient or again.inf_gradient,
                )
                yield revised, found

    def resume(self, before: Attempt, first_step: int, rules: Rules) -> None:
        """Take over the history of the attempt before, if this one continues it from a checkpoint.

        first_step: the number that the script gave its first step. One that starts at 0 may be another training.
        """
        last_step = max((i.last_step for i in before.instances.values() if i.last_step is not None), default=0)
        if 0 < first_step <= last_step + 1:
            self.detector.resume(before.detector, rules)
            self.inherited = self.detector.gradient.history()
            self.faults.resume(before.faults)

    def reset_detection(self, *, keep_open: Sequence[str]) -> None:
        """Restart detection without the history of the steps. keep_open: keys of incidents that stay open."""
        self.incidents = {key: number for key, number in self.incidents.items() if key in keep_open}
        self.detector, self.faults, self.noise = Detector(), FaultDetector(), NoiseScale()
        self.failure, self.needs_reevaluation = None, False


def _largest(values: NDArray[np.float64]) -> list[int]:
    """Return the layers with the largest finite values, in the model's order. values: [steps, layers]."""
    finite = np.isfinite(values)
    known = np.flatnonzero(finite.any(axis=0))
    peaks = np.where(finite, values, -math.inf).max(axis=0, initial=-math.inf)
    return sorted(known[np.argsort(-peaks[known], kind="stable")[:_MOST_LAYERS]].tolist())


def _newest_finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each layer's newest finite value, NaN without one: [layers]. values: [steps, layers]."""
    if not len(values):
        return np.full(values.shape[1], math.nan)
    finite = np.isfinite(values)
    newest = len(values) - 1 - finite[::-1].argmax(axis=0)
    found: NDArray[np.float64] = np.where(finite.any(axis=0), values[newest, np.arange(values.shape[1])], math.nan)
    return found
