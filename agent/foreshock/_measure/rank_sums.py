"""One small all-reduce per backward pass: what the ranks' own gradients and losses sum up to. Nothing waits for it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import NormSummary, Number
from foreshock._step import Observation
from foreshock_protos.columns import REDUCED_NAMES

SUM_FIELDS = REDUCED_NAMES[1:]
"""Fields of the all-reduce, after its sequence number: a fixed number, whatever the number of ranks."""


class FinishedSum(NamedTuple):
    """Holds a sum over ranks that has arrived."""

    sequence: int
    """Sequence number of its record."""
    values: Tensor
    """float64, [len(SUM_FIELDS)]: a buffer that a later sum will use."""
    scale: Number | None
    """Scale of that step's loss, which the square sum contains; None without a `GradScaler`."""


class LocalGradient(Protocol):
    """Knows the norms of this rank's own gradient."""

    @property
    def summary(self) -> NormSummary | None:
        """None if they were not measured."""


class Sums(Protocol):
    """Sums over the ranks of a model, once per backward pass that averages."""

    def prepare(self, sequence: int, local: LocalGradient | None, observation: Observation | None) -> None:
        """Set what this rank adds to the next sum. sequence: of the record. local: its own gradient."""

    def collect(self, scale: Number | None) -> Sequence[Number]:
        """Return the sequence number of the newest finished sum (0 if none), then its `SUM_FIELDS`.

        scale: of the loss of the newest sum, the same on every rank; None without a `GradScaler`.
        """

    def under_way(self) -> bool:
        """Return whether a sum has not finished."""


@dataclass(kw_only=True)
class _Slot:
    values: Tensor
    work: dist.Work | None = None
    """Kept until the slot is used again: gloo's thread must not hold the last reference, because releasing it needs the
    interpreter, and an interpreter that is about to end aborts the process."""
    taken: bool = True
    sequence: int = 0
    turn: int = 0
    """Number of the sum."""
    scale: Number | None = None
    """Scale of that step's loss, as far as it is known."""


class RankSums:
    """Sums `SUM_FIELDS` over the ranks of a model, once per backward pass that DDP averages.

    Every rank issues it at the same place of every such pass, whatever happens: a collective that depends on a rank's
    data or on its errors deadlocks the job.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, arithmetic: Arithmetic, depth: int = 4) -> None:
        self._group = group
        self._device = device
        self._arithmetic = arithmetic
        self._zero, self._one = arithmetic.constant(0.0), arithmetic.constant(1.0)
        self._scale: Number | None = None
        self._slots = [_Slot(values=self._buffer()) for _ in range(depth)]
        self._turn = 0
        self._prepared: _Slot | None = None
        self._idle = self.contribution(None, None)
        self._spare = _Slot(values=self._idle)
        """Slot of a sum to which this rank contributes nothing, and whose result it does not read."""
        self.newest: Sequence[Number] = [self._zero] * (1 + len(SUM_FIELDS))
        """Sequence number of the newest finished sum (0 if none), then its values."""
        self._newest_turn = 0
        # NCCL's futures know nothing of failures (its watchdog ends the process), and each costs host time.
        self._futures_fail = dist.get_backend(group) != "nccl"
        _all.add(self)

    def contribution(self, summary: NormSummary | None, loss: Number | None) -> Tensor:
        """Return this rank's part, [fields], finite: NaN and Inf are counted separately. Without a summary: idle."""
        a, zero, one = self._arithmetic, self._zero, self._one
        losses = loss_fields(a, loss, zero, one)
        square, nan, inf, idle = zero, zero, zero, one
        if summary is not None:
            # An infinite square of a finite norm, too, would make the sum useless.
            square = summary.total * summary.total
            square = a.where(a.finite(square), square, zero)
            nan, inf = a.counted(summary.nan_parameters > 0), a.counted(summary.inf_parameters > 0)
            idle = a.counted(summary.total == 0)
        return a.vector((square, nan, inf, idle, *losses))

    def prepare(self, sequence: int, local: LocalGradient | None, observation: Observation | None) -> None:
        """Set what this rank adds to the next sum. sequence: of the record. local: its own gradient."""
        slot = self._slots[self._turn % len(self._slots)]
        if slot.work is not None and not slot.work.is_completed():
            # Four steps behind: leave that buffer to its collective rather than wait for it.
            slot.values = self._buffer()
        self._fill(slot.values, local, None if observation is None else observation.loss)
        self._turn += 1
        slot.sequence, slot.turn, slot.scale, slot.taken = sequence, self._turn, self._scale, False
        self._prepared = slot

    def _fill(self, values: Tensor, local: LocalGradient | None, loss: Number | None) -> None:
        """Write what this rank adds to the sum."""
        values.copy_(self.contribution(None if local is None else local.summary, loss))

    def issue(self) -> None:
        """Start the sum. Where nothing is prepared, after an internal error or a detach, this rank still takes part."""
        slot, self._prepared = self._prepared, None
        if slot is None:
            slot = self._spare
            slot.values = self._idle.clone()
        slot.work = dist.all_reduce(slot.values, group=self._group, async_op=True)

    def arrived(self, scale: Number | None) -> FinishedSum | None:
        """Return the newest sum that has finished since this was asked last, without waiting; None if none has.

        scale: of the loss of the newest sum, the same on every rank; None without a `GradScaler`.
        """
        self._slots[(self._turn - 1) % len(self._slots)].scale = self._scale = scale
        found: FinishedSum | None = None
        for slot in self._slots:
            if slot.work is None or slot.taken or not slot.work.is_completed():
                continue
            slot.taken = True
            if slot.turn > self._newest_turn and (not self._futures_fail or succeeded(slot.work.get_future())):
                self._newest_turn = slot.turn
                found = FinishedSum(slot.sequence, slot.values, slot.scale)
        return found

    def collect(self, scale: Number | None) -> Sequence[Number]:
        """Return `newest`, updated with what has finished by now, without waiting. scale: as in `arrived`."""
        found = self.arrived(scale)
        if found is not None:
            # A copy: the buffer is used again.
            square, *others = self._arithmetic.numbers(found.values.clone())
            if found.scale is not None:
                square = self._arithmetic.ratio(square, found.scale * found.scale)
            self.newest = [self._arithmetic.constant(float(found.sequence)), square, *others]
        return self.newest

    def under_way(self) -> bool:
        """Return whether a sum has not finished."""
        slots = (*self._slots, self._spare)
        return any(slot.work is not None and not slot.work.is_completed() for slot in slots)

    def _buffer(self) -> Tensor:
        return torch.zeros(len(SUM_FIELDS), dtype=torch.float64, device=self._device)


def loss_fields(
    arithmetic: Arithmetic, loss: Number | None, zero: Number, one: Number
) -> tuple[Number, Number, Number, Number]:
    """Return what one rank's loss adds to the last four fields: its value if finite; 1 if it is finite, NaN, Inf.

    zero, one: constants of the arithmetic.
    """
    if loss is None:
        return zero, zero, zero, zero
    known = arithmetic.finite(loss)
    finite, nan = arithmetic.counted(known), arithmetic.counted(arithmetic.is_nan(loss))
    return arithmetic.where(known, loss, zero), finite, nan, one - finite - nan


_all: weakref.WeakSet[RankSums] = weakref.WeakSet()


def wait_for_sums(seconds: float) -> None:
    """Wait a limited time for the last sums: a process that ends with a collective under way may be aborted."""
    deadline = time.monotonic() + seconds
    while any(sums.under_way() for sums in _all) and time.monotonic() < deadline:
        time.sleep(0.001)


def succeeded(future: Future[list[Tensor]]) -> bool:
    """Return whether a completed collective has not failed: a failed one leaves its buffer stale. Waits for nothing."""
    try:
        if future.done():
            future.value()
            return True
    except RuntimeError:
        pass
    return False
