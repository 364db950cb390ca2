"""How each fault is put into a healthy job: one small class per cause, at most one thing changed."""

from __future__ import annotations

import math
import os
import time

import torch
from torch import Tensor, nn

from benchmarks.faults.cases import Case
from benchmarks.faults.tasks import Batch


class Fault:
    """None at all. The places where one may be put in, in the order of a step; `at` is the case's own."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case = case
        self.rank = rank
        self.bad_rank = rank == case.ranks - 1

    def model(self, model: nn.Module) -> None:
        """Before DDP wraps it."""

    def stream(self) -> int:
        """Which data this rank sees."""
        return self.rank

    def process(self, step: int) -> None:
        """Before the step."""

    def batch(self, step: int, batch: Batch) -> Batch:
        """What the model gets."""
        return batch

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        """What is derived."""
        return loss

    def observes(self, step: int) -> bool:
        """Whether the script observes the loss of this step."""
        return True

    def weights(self, step: int, model: nn.Module) -> None:
        """After the step."""


class LargeInitialisation(Fault):
    def model(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(self.case.factor)


class HighGain(Fault):
    """He's initialisation, a little too large: harmless in a shallow net, a factor per layer in a deep one."""

    def model(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, self.case.factor * (2 / parameter.shape[1]) ** 0.5)


class LongMemory(Fault):
    """Recurrent weights near the edge of stability: gradients neither die nor, at first, explode."""

    def model(self, model: nn.Module) -> None:
        recurrent = model.recurrent.weight_hh_l0  # type: ignore[union-attr]
        nn.init.orthogonal_(recurrent)  # type: ignore[arg-type]
        recurrent.data.mul_(self.case.factor)  # type: ignore[operator]


class UnshiftedSoftmax(Fault):
    """exp(x) / sum(exp(x)) without taking the largest off: infinite over infinite beyond 88."""

    def batch(self, step: int, batch: Batch) -> Batch:
        return (batch[0] * self.case.factor, batch[1]) if step == self.case.at else batch

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        # Logits in half precision's reach in ordinary steps; one sample far out is enough.
        raised = output.exp()
        share = raised / raised.sum(dim=1, keepdim=True)
        return -share.gather(1, target[:, None]).clamp_min(1e-9).log().mean()


class DivisionByZero(Fault):
    """A mean over the samples that a mask keeps, when it keeps none."""

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        kept = torch.full_like(output[:, :1], float(step != self.case.at))
        each = (output - target).square()
        return (kept * each).sum() / (kept.sum() * output.shape[1])


class LogOfZero(Fault):
    """The logarithm of a probability that has underflowed."""

    def batch(self, step: int, batch: Batch) -> Batch:
        return (batch[0] * self.case.factor, batch[1]) if step == self.case.at else batch

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        return -torch.softmax(output, dim=1).gather(1, target[:, None]).log().mean()


class MissingValue(Fault):
    """A NaN in the data, on every rank: a column that was empty that day."""

    everywhere = True
    value = math.nan

    def batch(self, step: int, batch: Batch) -> Batch:
        if step == self.case.at and (self.everywhere or self.bad_rank):
            batch[0].view(-1)[7] = self.value
        return batch


class BadBatch(MissingValue):
    """The same on one rank."""

    everywhere = False


class InfiniteBatch(BadBatch):
    value = math.inf


class BitFlip(Fault):
    """The highest bits of one element of one rank's gradient, before the all-reduce: a bad memory cell."""

    def model(self, model: nn.Module) -> None:
        self._step = -1
        if self.bad_rank:
            list(model.parameters())[-2].register_hook(self._flip)  # type: ignore[no-untyped-call]

    def process(self, step: int) -> None:
        self._step = step

    def _flip(self, gradient: Tensor) -> Tensor:
        if self._step == self.case.at:
            gradient = gradient.clone()
            gradient.view(-1)[3:4].view(torch.int32).bitwise_or_(0x7F800000 if self.case.factor < 1 else 0x7E000000)
        return gradient


class SharedData(Fault):
    """No DistributedSampler: every rank draws the same batches."""

    def stream(self) -> int:
        return 0


class Drift(Fault):
    """One rank changes a weight by itself."""

    def weights(self, step: int, model: nn.Module) -> None:
        if step == self.case.at and self.bad_rank:
            next(model.parameters()).data.view(-1)[0] += 1e-3


class Ascent(Fault):
    """From some step on the sign of the objective is wrong. Its slope is bounded, so the norm stays as it is."""

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        return loss if step < self.case.at else 2 * loss.detach() - loss


class ZeroLoss(Fault):
    """The loss of GRPO: zero in value, whatever its gradient, but for a penalty that grows to `factor`."""

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        value = self.case.factor * (1 - math.exp(-step / 300)) if self.case.fault == "zero_loss" else 0.0
        return loss - loss.detach() + value


class Death(Fault):
    def process(self, step: int) -> None:
        if step == self.case.at and self.bad_rank:
            os._exit(1)


class Standstill(Fault):
    def process(self, step: int) -> None:
        if step == self.case.at and self.bad_rank:
            time.sleep(1e6)


class Collapse(Fault):
    """A loss whose gradient half precision cannot hold at any scale."""

    def loss(self, step: int, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        if step < self.case.at:
            return loss
        # Finite itself; its gradient is infinite.
        return loss + (output.float().sum() * 0).abs().sqrt()


class HardBatches(Fault):
    """Now and then a batch is far out; with clipping the run comes back from it."""

    def batch(self, step: int, batch: Batch) -> Batch:
        hard = step >= self.case.at and (step - self.case.at) % 200 < 2
        return (batch[0] * self.case.factor, batch[1]) if hard else batch


class HarderData(Fault):
    """A curriculum's next stage: from some step on inputs are larger."""

    def batch(self, step: int, batch: Batch) -> Batch:
        return (batch[0] * self.case.factor, batch[1]) if step >= self.case.at else batch


class Pause(Fault):
    """An evaluation."""

    def process(self, step: int) -> None:
        if step % 100 == 99:
            time.sleep(0.05)


class Unobserved(Fault):
    """The script stops to observe its loss."""

    def observes(self, step: int) -> bool:
        return step < self.case.at


FAULTS: dict[str, type[Fault]] = {
    "large_initialisation": LargeInitialisation,
    "no_normalisation": HighGain,
    "long_sequence": LongMemory,
    "unshifted_softmax": UnshiftedSoftmax,
    "division_by_zero": DivisionByZero,
    "log_of_zero": LogOfZero,
    "missing_value": MissingValue,
    "bad_batch": BadBatch,
    "infinite_batch": InfiniteBatch,
    "bit_flip": BitFlip,
    "shared_data": SharedData,
    "replica_drift": Drift,
    "ascent": Ascent,
    "zero_loss": ZeroLoss,
    "zero_loss_jump": ZeroLoss,
    "dead_rank": Death,
    "stalled_rank": Standstill,
    "scale_collapse": Collapse,
    "hard_batches": HardBatches,
    "harder_data": HarderData,
    "evaluation_pauses": Pause,
    "unobserved": Unobserved,
}
"""Where a case's fault is not here, its settings are the fault: a learning rate, a precision, a depth."""


def fault_of(case: Case, rank: int) -> Fault:
    """What to put in."""
    return FAULTS.get(case.fault, Fault)(case, rank)
