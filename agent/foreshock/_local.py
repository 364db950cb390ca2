"""This rank's own gradient, bucket by bucket, before the all-reduce; and the small sum over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from foreshock._norms import NormSummary, gradient_norms, known_finite, summarize
from foreshock._summary import ParameterPlan

SUM_FIELDS = (
    "reduced_square_sum",
    "reduced_nan_ranks",
    "reduced_inf_ranks",
    "reduced_idle_ranks",
    "reduced_loss_sum",
    "reduced_loss_count",
    "reduced_nan_losses",
    "reduced_inf_losses",
)
"""What the all-reduce of a step carries: fixed, so O(1) in the world size. `StepBatch` says what each means."""


class LocalNorms:
    """Collects per-parameter norms over the buckets of one backward pass; knows nothing of DDP."""

    def __init__(self, plan: ParameterPlan) -> None:
        self._plan = plan
        self._norms: list[Tensor] = []
        self._order: list[int] = []
        self._whole = True
        self._indices: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        self.summary: NormSummary | None = None
        """Of the newest backward pass; None before the first, where none of ours took part, or one is missing."""

    def measure(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """One bucket: parameters and this rank's gradients of them, in the order of the bucket."""
        if first:
            # A backward pass that raised has left its part behind.
            self._norms, self._order, self._whole = [], [], True
        # Stays false if this bucket fails: a sum without it would look like a small gradient.
        whole, self._whole = self._whole, False
        index = self._plan.index
        ours = [(index[p], g) for p, g in zip(parameters, gradients, strict=True) if p in index]
        if ours:
            self._norms.append(gradient_norms([g for _, g in ours]))
            self._order += [i for i, _ in ours]
        self._whole = whole

    def close(self) -> None:
        """The last bucket has been measured: sum up, in the order of arrival, which is the backward order."""
        norms, order = self._norms, tuple(self._order)
        self._norms, self._order = [], []
        self.summary = None
        if norms and self._whole:
            indices, layer_of = self._index_tensors(order, norms[0].device)
            self.summary = summarize(torch.cat(norms), indices, layer_of, len(self._plan.layers))

    def _index_tensors(self, order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        # The order changes once, when DDP rebuilds its buckets: keep the tensors for as long as it holds.
        if self._indices is None or self._indices[0] != order:
            layer_of = [self._plan.layer_of[i] for i in order]
            self._indices = (order, torch.tensor(order, device=device), torch.tensor(layer_of, device=device))
        return self._indices[1], self._indices[2]


@dataclass(kw_only=True)
class _InFlight:
    values: Tensor
    work: dist.Work | None
    """Kept until the next one takes its place: see `BucketHook.works`."""
    taken: bool
    sequence: int
    scale: Tensor | None
    """What the loss of that step was multiplied by, as far as it is known."""


class RankSums:
    """One asynchronous all-reduce of `SUM_FIELDS` per step, awaited by nobody.

    Every rank issues it at the same place of every backward pass, whatever happens: a collective that depends on a
    rank's data or on its errors deadlocks the job.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, depth: int = 4) -> None:
        self._group = group
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._scale: Tensor | None = None
        self._ring = [
            _InFlight(values=self._zero.repeat(len(SUM_FIELDS)), work=None, taken=True, sequence=0, scale=None)
            for _ in range(depth)
        ]
        self._turn = 0
        self.newest = torch.zeros(1 + len(SUM_FIELDS), dtype=torch.float64, device=device)
        """The sequence number that issued the newest finished sum (0: none yet), then its values."""
        self._newest_sequence = 0

    def contribution(self, summary: NormSummary | None, loss: Tensor | None) -> Tensor:
        """This rank's part. Sums stay finite: NaN and Inf are counted beside them. Without a summary it is idle."""
        zero, one = self._zero, self._one
        square, nan, inf, idle = zero, zero, zero, one
        if summary is not None:
            # An infinite square of a finite norm, too, would make the sum useless.
            square = summary.total.square().nan_to_num(0.0, 0.0)
            nan, inf = summary.nan_parameters.clamp(max=1.0), summary.inf_parameters.clamp(max=1.0)
            idle = (summary.total == 0).to(zero.dtype)
        losses = (zero, zero, zero, zero)
        if loss is not None and known_finite(loss):
            losses = (loss, one, zero, zero)
        elif loss is not None:
            nan_loss, inf_loss = loss.isnan().to(zero.dtype), loss.isinf().to(zero.dtype)
            losses = (loss.nan_to_num(0.0, 0.0, 0.0), one - nan_loss - inf_loss, nan_loss, inf_loss)
        return torch.stack((square, nan, inf, idle, *losses))

    def issue(self, sequence: int, contribution: Tensor | None) -> None:
        """Start the sum of a step. `contribution` None: this rank had an internal error, and must take part still."""
        slot = self._ring[self._turn]
        self._turn = (self._turn + 1) % len(self._ring)
        if slot.work is not None and not slot.work.is_completed():
            # Four steps behind: leave that buffer to its collective rather than wait for it.
            slot.values = torch.empty_like(slot.values)
        if contribution is None:
            contribution = self.contribution(None, None)
        slot.values.copy_(contribution)
        slot.sequence, slot.scale, slot.taken = sequence, self._scale, False
        slot.work = dist.all_reduce(slot.values, group=self._group, async_op=True)

    def scaled_by(self, scale: Tensor | None) -> None:
        """What the loss of the newest sum was multiplied by: float64 scalar, the same on every rank; None: nothing."""
        self._ring[self._turn - 1].scale = self._scale = scale

    def collect(self) -> Tensor:
        """`newest`, brought up to date with what has finished by now. Waits for nothing."""
        for slot in self._ring:
            if slot.work is None or slot.taken or not slot.work.is_completed():
                continue
            slot.taken = True
            if slot.sequence > self._newest_sequence and _succeeded(slot.work.get_future()):
                self._newest_sequence = slot.sequence
                self.newest[0] = slot.sequence
                self.newest[1:] = slot.values
                if slot.scale is not None:
                    self.newest[1 + SUM_FIELDS.index("reduced_square_sum")] /= slot.scale.square()
        return self.newest

    def under_way(self) -> bool:
        """A sum has not finished."""
        return any(slot.work is not None and not slot.work.is_completed() for slot in self._ring)


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
