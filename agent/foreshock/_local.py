"""This rank's own gradient, bucket by bucket, before the all-reduce; and the small sum over ranks."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from foreshock._averaged import AveragedGradient
from foreshock._norms import Norms, NormSummary, gradient_norms, summarize
from foreshock._numbers import (
    Number,
    at_most,
    constant,
    counted,
    finite,
    is_nan,
    numbers,
    ratio,
    vector,
    where,
)
from foreshock._summary import ParameterPlan
from foreshock_protos.columns import REDUCED_NAMES

SUM_FIELDS = REDUCED_NAMES[1:]
"""What the all-reduce of a step carries, behind its sequence number: fixed, so O(1) in the world size."""


class LocalNorms:
    """Collects per-parameter norms over the buckets of one backward pass; knows nothing of DDP."""

    def __init__(self, plan: ParameterPlan) -> None:
        self._plan = plan
        self._device = plan.device()
        self._norms: list[Norms] = []
        self._order: list[int] = []
        self._whole = True
        self._places = plan.places(())
        self.summary: NormSummary | None = None
        """Of the newest backward pass; None before the first, where none of ours took part, or one is missing."""

    def measure(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """One bucket: parameters and this rank's gradients of them, in the order of arrival."""
        if first:
            # A backward pass that raised has left its part behind.
            self._norms, self._order, self._whole = [], [], True
        # Stays false if this bucket fails: a sum without it would look like a small gradient.
        whole, self._whole = self._whole, False
        index = self._plan.index
        ours = [(index[p], g) for p, g in zip(parameters, gradients, strict=True) if p in index]
        if ours:
            self._norms.append(gradient_norms([g for _, g in ours], self._device))
            self._order += [i for i, _ in ours]
        self._whole = whole

    def close(self) -> None:
        """The last bucket has been measured: sum up, in the order of arrival, which is the backward order."""
        norms, order = self._norms, tuple(self._order)
        self._norms, self._order = [], []
        self.summary = None
        if norms and self._whole:
            # The order changes once, when DDP rebuilds its buckets.
            if self._places.parameters != order:
                self._places = self._plan.places(order)
            self.summary = summarize(_joined(norms), self._places)

    def own(self, _: AveragedGradient, __: NormSummary, scale: Number | None) -> NormSummary | None:
        """`summary`, unscaled. scale: of the loss."""
        return self.summary if self.summary is None or scale is None else self.summary.unscaled(scale)


def _joined(norms: list[Norms]) -> Norms:
    there = [part for part in norms if isinstance(part, Tensor)]
    return torch.cat(there) if there else [norm for part in norms for norm in part]


@dataclass(kw_only=True)
class _InFlight:
    values: Tensor
    work: dist.Work | None
    """Kept until the next one takes its place: see `BucketHook.works`."""
    taken: bool
    sequence: int
    turn: int
    """The sums that were started before it."""
    scale: Number | None
    """What the loss of that step was multiplied by, as far as it is known."""


class RankSums:
    """One asynchronous all-reduce of `SUM_FIELDS` per step, awaited by nobody.

    Every rank issues it at the same place of every backward pass, whatever happens: a collective that depends on a
    rank's data or on its errors deadlocks the job.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, depth: int = 4) -> None:
        self._group = group
        self._device = device
        self._zero, self._one = constant(0.0, device), constant(1.0, device)
        self._scale: Number | None = None
        self._ring = [
            _InFlight(values=self._buffer(), work=None, taken=True, sequence=0, turn=0, scale=None)
            for _ in range(depth)
        ]
        self._turn = 0
        self._prepared: _InFlight | None = None
        self._idle = self.contribution(None, None)
        self._spare = _InFlight(values=self._idle, work=None, taken=True, sequence=0, turn=0, scale=None)
        """Of a sum that this rank has nothing to say to, and whose result it leaves alone."""
        self.newest: Sequence[Number] = [self._zero] * (1 + len(SUM_FIELDS))
        """The sequence number that issued the newest finished sum (0: none yet), then its values."""
        self._newest_turn = 0
        _all.add(self)

    def contribution(self, summary: NormSummary | None, loss: Number | None) -> Tensor:
        """This rank's part. Sums stay finite: NaN and Inf are counted beside them. Without a summary it is idle."""
        zero, one = self._zero, self._one
        square, nan, inf, idle = zero, zero, zero, one
        if summary is not None:
            # An infinite square of a finite norm, too, would make the sum useless.
            square = summary.total * summary.total
            square = where(finite(square), square, 0.0)
            nan, inf = at_most(summary.nan_parameters, 1.0), at_most(summary.inf_parameters, 1.0)
            idle = counted(summary.total == 0)
        losses = (zero, zero, zero, zero)
        if loss is not None:
            known = finite(loss)
            count, nan_loss = counted(known), counted(is_nan(loss))
            losses = (where(known, loss, 0.0), count, nan_loss, one - count - nan_loss)
        return vector((square, nan, inf, idle, *losses), self._device)

    def prepare(self, sequence: int, contribution: Tensor) -> None:
        """Make ready what this rank adds to the sum of a step."""
        slot = self._ring[self._turn % len(self._ring)]
        if slot.work is not None and not slot.work.is_completed():
            # Four steps behind: leave that buffer to its collective rather than wait for it.
            slot.values = self._buffer()
        slot.values.copy_(contribution)
        self._turn += 1
        slot.sequence, slot.turn, slot.scale, slot.taken = sequence, self._turn, self._scale, False
        self._prepared = slot

    def issue(self) -> None:
        """Start the sum. Where nothing is prepared, after an internal error or a detach, this rank takes part still."""
        slot, self._prepared = self._prepared, None
        if slot is None:
            slot = self._spare
            slot.values = self._idle.clone()
        slot.work = dist.all_reduce(slot.values, group=self._group, async_op=True)

    def scaled_by(self, scale: Number | None) -> None:
        """What the loss of the newest sum was multiplied by, the same on every rank; None: nothing."""
        self._ring[(self._turn - 1) % len(self._ring)].scale = self._scale = scale

    def collect(self) -> Sequence[Number]:
        """`newest`, brought up to date with what has finished by now. Waits for nothing."""
        for slot in self._ring:
            if slot.work is None or slot.taken or not slot.work.is_completed():
                continue
            slot.taken = True
            if slot.turn > self._newest_turn and _succeeded(slot.work.get_future()):
                self._newest_turn = slot.turn
                # A copy: the buffer goes on to another step.
                square, *others = numbers(slot.values.clone())
                if slot.scale is not None:
                    square = ratio(square, slot.scale * slot.scale)
                self.newest = [constant(float(slot.sequence), self._device), square, *others]
        return self.newest

    def _buffer(self) -> Tensor:
        return torch.zeros(len(SUM_FIELDS), dtype=torch.float64, device=self._device)

    def under_way(self) -> bool:
        """A sum has not finished."""
        slots = (*self._ring, self._spare)
        return any(slot.work is not None and not slot.work.is_completed() for slot in slots)


_all: weakref.WeakSet[RankSums] = weakref.WeakSet()


def settle(seconds: float) -> None:
    """Bounded wait for the last sums: a process that ends with a collective under way may be aborted."""
    deadline = time.monotonic() + seconds
    while any(sums.under_way() for sums in _all) and time.monotonic() < deadline:
        time.sleep(0.001)


def _succeeded(future: Future[list[Tensor]]) -> bool:
    """Of a completed collective: a failed one is completed too, and its buffer stale. Waits for nothing.

    NCCL does not tell a future of its failures; its watchdog ends the process.
    """
    try:
        if future.done():
            future.value()
            return True
    except RuntimeError:
        pass
    return False
