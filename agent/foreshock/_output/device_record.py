"""Records whose numbers lie on a device: written there by kernels, or by tensor operations."""

from __future__ import annotations

import torch

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._output.pinned_ring import ObservedWords, PinnedRing, pinned_ring
from foreshock._output.record import Record
from foreshock._output.staging import StagedRing
from foreshock._step import Step
from foreshock_recorder.ring import Ring


class DeviceRecord(Record):
    """Writes the parts of each step's record through pinned memory, and waits for none of them."""

    def __init__(self, ring: Ring, arithmetic: Arithmetic, target: PinnedRing | StagedRing) -> None:
        super().__init__(ring, arithmetic)
        self.target = target

    def observe_by(self, observed_words: ObservedWords) -> None:
        """Write by a kernel what is observed after its step."""
        if isinstance(self.target, PinnedRing):
            self.target.observed_words = observed_words

    def write(self, step: Step) -> None:
        if not step.begun or self._closed:
            return
        sequence, target = self.sequence, self.target
        number, loss = step.observation or (None, None)
        words = step.words if step.complete else None
        row = self._row(step) if step.complete and words is None else None
        if step.observation is not None and loss is None:
            self.ring.write_observed(sequence, step=number, loss=None)
        elif loss is not None and words is None:
            target.write_observed(sequence, number, loss)
        if step.complete and step.weights is not None and step.weights.layers is not None:
            target.write_weights(sequence, step.weights.layers)
        if words is not None:
            target.write_words(sequence, words, observed=loss is not None)
        elif row is not None:
            target.write_measured(sequence, row)

    def drain(self) -> None:
        if isinstance(self.target, StagedRing):
            self.target.drain()

    def flush(self) -> bool:
        return self.target.flush()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.target.close()


def record_for(ring: Ring, device: torch.device, arithmetic: Arithmetic) -> Record:
    """Return what writes the records of steps on a device."""
    if device.type == "cpu":
        return Record(ring, arithmetic)
    pinned = pinned_ring(ring, torch.cuda.cudart()) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    return DeviceRecord(ring, arithmetic, pinned or StagedRing(ring))
