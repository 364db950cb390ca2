"""Step records on their way from the device into the ring.

On a CPU every part is written at once. On CUDA a value is staged: copied without blocking into pinned memory, and moved
into the ring on a later step, once an event says that it has arrived. Nothing here waits, but for `flush`.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock._norms import Norms
from foreshock._numbers import Number
from foreshock._weights import WeightSummary
from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder.ring import Ring

_LOSSES = ("reduced_loss_count", "reduced_nan_losses", "reduced_inf_losses")
_STAGES = 32
"""Rows under way at most; a device further behind loses records, counted, rather than memory."""

_FLUSH_SECONDS = 2.0
"""A device that lives is a few steps behind."""


@dataclass(kw_only=True)
class _Stage:
    host: Tensor
    arrived: torch.cuda.Event
    deliver: Callable[[Tensor], None]


class Records:
    """Writes the three parts of a step's record into a rank's ring."""

    def __init__(self, ring: Ring, device: torch.device) -> None:
        self.ring = ring
        self._device = device
        self._sequence = 0
        self._closed = False
        self._staged: deque[_Stage] = deque()
        self._free: list[Tensor] = []
        if device.type != "cpu":
            shape = (_STAGES, max(ring.layout.columns, ring.layout.weights.words))
            self._free = list(torch.empty(shape, dtype=torch.float64, pin_memory=True).unbind())

    @property
    def next_sequence(self) -> int:
        """Number of the record that the next step will open."""
        return self._sequence + 1

    @property
    def sequence(self) -> int:
        """Number of the newest record; 0 before the first."""
        return self._sequence

    @property
    def losses_told(self) -> int:
        """Ranks that told their loss, by the newest sum over them that has come into the ring."""
        newest = self.ring.measured
        if not newest:
            return 0
        row = struct.unpack_from(f"<{len(MEASURED_NAMES)}d", self.ring.memory, self.ring.measured_offset(newest))
        return int(sum(row[MEASURED_NAMES.index(name)] for name in _LOSSES))

    def begin_step(self, *, step: int, learning_rate: float, flags: int = 0) -> None:
        """Open the record of a step that begins. flags: as `Ring.begin_step` takes them."""
        self._drain()
        if not self._closed:
            self.ring.begin_step(
                self._sequence + 1,
                step=step,
                wall=time.time(),
                monotonic=time.monotonic(),
                learning_rate=learning_rate,
                flags=flags,
            )
        self._sequence += 1

    def measured(self, row: Norms, weights: WeightSummary | None = None) -> None:
        """Write the newest record's row, [columns], after what was measured of its weights by layer."""
        sequence = self._sequence
        if self._closed:
            return
        if weights is not None and weights.layers is not None:
            self._write(weights.layers, lambda values: self.ring.write_weights(sequence, values))
        self._write(row, lambda values: self.ring.write_measured(sequence, values))

    def observed(self, sequence: int, *, step: int | None, loss: Number | None) -> None:
        """What the script told about a record's step."""
        if self._closed:
            return
        if isinstance(loss, Tensor):
            self._stage(loss, lambda host: self.ring.write_observed(sequence, step=step, loss=float(host[0])))
        else:
            self.ring.write_observed(sequence, step=step, loss=loss)

    def flush(self) -> bool:
        """Bounded wait for everything under way, for the end of a run only. Whether all of it has arrived.

        A device that waits for a rank that has gone never gets there: a process must end all the same.
        """
        deadline = time.monotonic() + _FLUSH_SECONDS
        self._drain()
        while self._staged and time.monotonic() < deadline:
            time.sleep(0.001)
            self._drain()
        return not self._staged

    def close(self) -> None:
        """Go on counting, and write no more: after the exit, which ends what the collector is sent."""
        self._closed = True

    def _write(self, values: Norms, write: Callable[[list[float]], None]) -> None:
        if isinstance(values, Tensor):
            length = len(values)
            self._stage(values, lambda host: write(host[:length].tolist()))
        else:
            write(values)

    def _stage(self, value: Tensor, deliver: Callable[[Tensor], None]) -> None:
        if value.is_cpu:
            deliver(value.reshape(-1))
            return
        if not self._free:
            self.ring.count_dropped("probe_error")
            self.ring.write_error(f"the device is more than {_STAGES} values behind")
            return
        host = self._free.pop()
        host[: value.numel()].copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._staged.append(_Stage(host=host, arrived=arrived, deliver=deliver))

    def _drain(self) -> None:
        while self._staged and self._staged[0].arrived.query():  # type: ignore[no-untyped-call]
            stage = self._staged.popleft()
            stage.deliver(stage.host)
            self._free.append(stage.host)
