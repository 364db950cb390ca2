"""Records on their way from a device into a ring whose own memory cannot be pinned."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock._arithmetic.norms import Norms, Number
from foreshock_recorder.layout import HAS_STEP, OBSERVED_PAYLOAD, RECORD_ROW
from foreshock_recorder.ring import Ring

_STAGES = 32
"""Most rows under way: a device further behind loses records, which are counted, rather than memory."""
FLUSH_SECONDS, POLL_SECONDS = 2.0, 0.001
"""Seconds to wait for a device, which is normally a few steps behind."""


@dataclass(kw_only=True)
class _Stage:
    host: Tensor
    whole: Tensor
    """The memory of which `host` is a part."""
    arrived: Any
    """A `torch.cuda.Event`."""
    deliver: Callable[[list[Any]], None]


class StagedRing:
    """Copies parts of records into pinned memory without blocking, and moves them into the ring at a later step, when
    an event shows that they have arrived. Only `flush` waits.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._staged: deque[_Stage] = deque()
        most = max(RECORD_ROW + ring.layout.columns + 2, ring.layout.weights.words)
        self._free = list(torch.empty((_STAGES, most), dtype=torch.int64, pin_memory=True).unbind())

    def write_observed(self, sequence: int, number: int | None, loss: Number) -> None:
        """Start the copy of what the script observed of a record's step."""
        value = torch.as_tensor(loss, dtype=torch.float64).reshape(1)
        self._stage(value, lambda floats: self._ring.write_observed(sequence, step=number, loss=floats[0]))

    def write_weights(self, sequence: int, blocks: Norms) -> None:
        """Start the copy of what was measured of the weights by layer. blocks: WEIGHT_BLOCKS."""
        self._stage(blocks, lambda floats: self._ring.write_weights(sequence, floats))

    def write_measured(self, sequence: int, row: Norms) -> None:
        """Start the copy of the measured part. row: float64, [columns]."""
        self._stage(row, lambda floats: self._ring.write_measured(sequence, floats))

    def write_words(self, sequence: int, words: Tensor, *, observed: bool) -> None:
        """Start the copy of a record that kernels have laid out. words: int64, `StepKernel.words`."""
        self._stage(words, lambda values: _write_words(self._ring, sequence, values, observed=observed))

    def flush(self) -> bool:
        """Wait a limited time for everything under way. Return whether all has arrived."""
        deadline = time.monotonic() + FLUSH_SECONDS
        self.drain()
        while self._staged and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.drain()
        return not self._staged

    def close(self) -> None:
        """Give nothing back: its memory goes with it."""

    def _stage(self, values: Any, deliver: Callable[[list[Any]], None]) -> None:
        self.drain()
        if not self._free:
            self._ring.count_dropped("probe_error")
            self._ring.write_error(f"the device is more than {_STAGES} values behind")
            return
        whole = self._free.pop()
        host = whole[: len(values)].view(values.dtype)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._staged.append(_Stage(host=host, whole=whole, arrived=arrived, deliver=deliver))

    def drain(self) -> None:
        """Move into the ring what has arrived."""
        while self._staged and self._staged[0].arrived.query():
            stage = self._staged.popleft()
            stage.deliver(stage.host.tolist())
            self._free.append(stage.whole)


def _write_words(ring: Ring, sequence: int, values: list[int], *, observed: bool) -> None:
    """Write a record that kernels have laid out. values: the words of `StepKernel.words`."""
    payload = struct.pack(f"<{len(values)}q", *values)
    if observed:
        number, loss, flags = OBSERVED_PAYLOAD.unpack_from(payload)
        ring.write_observed(sequence, step=number if flags & HAS_STEP else None, loss=loss)
    ring.write_measured(sequence, struct.unpack_from(f"<{ring.layout.columns}d", payload, 8 * RECORD_ROW))
