"""Norms of a model that `fully_shard` has sharded: each rank measures its shards, and one small all-reduce adds up.

A rank holds a shard of each averaged gradient, and none of its own gradient before the reduction. The squared norms of
a parameter's shards add up to its squared norm, and a NaN or Inf in one of them shows in the sum: so these sums are all
that a step needs. They are exact for norms between 1e-150 and 1e150.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Norms, NormSummary, Number
from foreshock._arithmetic.parameters import ParameterPlan, updated_plan
from foreshock._control.optimizer import OptimizerControl
from foreshock._measure.measure import Measure
from foreshock._measure.rank_sums import SUM_FIELDS, LocalGradient, loss_fields
from foreshock._measure.script import SAME, GradientEdits
from foreshock._step import Observation, Step
from foreshock._torch import shard_of

_LOSS_FIELDS = 4
_SAMPLED = 4096
"""Elements of a shard whose norm is compared."""


class ShardSums:
    """Sums squared norms over shards, and losses over ranks, once per backward pass that reduces gradients.

    Every rank issues it at the end of every such pass, with as many numbers, whatever happens and whether or not it
    still watches: a collective that depends on a rank's data or on its errors deadlocks the job. So it contains all
    parameters of the model, even if the optimizer holds only some.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], group: dist.ProcessGroup, replicas: int, arithmetic: Arithmetic
    ) -> None:
        """named: all shards. group: all ranks that train the model. replicas: ranks that hold the same shard.

        Replicas take part as well: if each group of shards had a sum of its own, rounding might tell them apart.
        """
        self.named = dict(named)
        self.parameters = tuple(named.values())
        self.index: dict[Tensor, int] = {parameter: i for i, parameter in enumerate(self.parameters)}
        self._group = group
        self._replicas = replicas
        self._arithmetic = arithmetic
        self._device = self.parameters[0].device
        self._zero, self._one = arithmetic.constant(0.0), arithmetic.constant(1.0)
        self.edits: Number = self._zero
        """1 if this rank's newest step had edited gradients, to be added to the next sum."""
        self._present: tuple[int, ...] = ()
        self._positions = torch.zeros(0, dtype=torch.int64, device=self._device)
        # Squares, edits, losses.
        self._sums = torch.zeros(len(self.parameters) + 1 + _LOSS_FIELDS, dtype=torch.float64, device=self._device)
        self._next = torch.zeros_like(self._sums)
        self._edited = self._sums[len(self.parameters)]
        self._prepared = self._sequence = 0
        self._work: dist.Work | None = None
        """Kept until the next one: gloo's thread must not hold the last reference, because releasing it needs the
        interpreter, and an interpreter that is about to end aborts the process."""

    def prepare(self, sequence: int, _: LocalGradient | None, observation: Observation | None) -> None:
        """Set what this rank adds to the next sum beside its shards. sequence: of the record."""
        loss = None if observation is None else observation.loss
        losses = loss_fields(self._arithmetic, loss, self._zero, self._one)
        self._next[len(self.parameters) :] = self._arithmetic.vector((self.edits, *losses))
        self._prepared = sequence

    def measure(self) -> None:
        """Measure this rank's shards of the gradients, for the next sum."""
        shards = self._shards()
        self._add(torch.as_tensor(self._arithmetic.norms(shards), dtype=torch.float64))

    def measure_fallback(self) -> None:
        """Measure them by other means, where `measure` has failed on this rank."""
        norms = [torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in self._shards()]
        self._add(torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64))

    def issue(self) -> None:
        """Sum up over the ranks. On a GPU nothing waits: later work on the stream follows the result."""
        self._work = dist.all_reduce(self._next, group=self._group, async_op=True)
        assert self._work is not None
        self._work.wait()
        self._sums, self._next = self._next, torch.zeros_like(self._next)
        self._sequence, self._prepared = self._prepared, 0
        self._edited = self._edited + self._sums[len(self.parameters)]

    def squares(self, positions: Tensor) -> Tensor:
        """Return the newest squared norms of parameters, [n], float64. positions: in `parameters`, int64, [n]."""
        squares: Tensor = self._sums[positions]
        return squares

    def edited(self) -> Flag:
        """Return whether the script has edited gradients, on any rank and in any step before the newest sum."""
        return self._arithmetic.number(self._edited) > 0

    def collect(self, _: Number | None) -> Sequence[Number]:
        """Return the sequence number of the newest sum (0 if none), then `SUM_FIELDS`: those of ranks' own gradients
        are 0.
        """
        losses = self._arithmetic.numbers(self._sums[-_LOSS_FIELDS:])
        none = [self._zero] * (len(SUM_FIELDS) - _LOSS_FIELDS)
        return [self._arithmetic.constant(float(self._sequence)), *none, *losses]

    def under_way(self) -> bool:
        """Return whether a sum has not finished."""
        return self._work is not None and not self._work.is_completed()

    def _shards(self) -> list[Tensor]:
        """Return the shards of the gradients that exist, and remember whose they are."""
        shards, present = [], []
        for position, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is not None and (shard := shard_of(gradient)).numel():
                shards.append(shard)
                present.append(position)
        if self._present != tuple(present):
            self._present = tuple(present)
            self._positions = torch.tensor(present, dtype=torch.int64, device=self._device)
        return shards

    def _add(self, norms: Tensor) -> None:
        self._next.index_copy_(0, self._positions, norms.square() / self._replicas)


class ShardEdits(GradientEdits):
    """Notices a script's own clipping by values, one step late: torch's changes no version of a sharded gradient.

    Ranks must agree on what is not clipped again, so what each sees is added to the next sum.
    """

    def __init__(self, plan: ParameterPlan, arithmetic: Arithmetic, sums: ShardSums) -> None:
        super().__init__(plan.parameters, arithmetic)
        self._sums = sums
        self._before: Number | None = None
        """Norm of the sample at the end of backward."""

    def backward_ended(self, sequence: int, passes: int) -> bool:
        """Remember versions and values, which are compared without a norm of all."""
        super().backward_ended(sequence, passes)
        self._before = self._sample()
        self.compares = False
        return passes == 1 or self.seen

    def compare(self, step: Step) -> None:
        """Fill in whether the script has edited the gradients, or did so before."""
        super().compare(step)
        step.edited |= self._arithmetic.is_one(self._arithmetic.counted(self._sums.edited()))

    def compare_values(self, step: Step) -> None:
        """Compare the gradients with those at the end of backward, unless they are from an older pass."""
        before, self._before = self._before, None
        if before is None:
            return
        a, now = self._arithmetic, self._sample()
        if step.grad_scale is None and step.loss_scale is not None:
            # They have been unscaled meanwhile.
            now = now * step.loss_scale
        self._sums.edits = a.counted(a.absolute(now - before) > SAME * before)

    def _sample(self) -> Number:
        shards = [shard_of(p.grad).reshape(-1)[:_SAMPLED] for p in self._ends if p.grad is not None]
        return self._arithmetic.total(self._arithmetic.norms(shards))


class ShardedMeasure(Measure):
    """Measures the averaged gradient from its shards, as it was at the end of backward. Neither a rank's own gradient
    nor the weights are measured, since no rank holds them.
    """

    def __init__(
        self,
        plan: ParameterPlan,
        optimizer: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        control: OptimizerControl,
        sums: ShardSums,
    ) -> None:
        super().__init__(plan, optimizer, arithmetic, control, local_norms=False, single=False, views=False)
        self._sums = sums
        self.edits: ShardEdits = ShardEdits(plan, arithmetic, sums)
        # The order of arrival, more or less: of several bad parameters, the first to arrive is the one to name.
        self._arrival = plan.layout(self._all[::-1])
        positions = [sums.index[plan.parameters[i]] for i in self._arrival.parameters]
        self._positions = torch.tensor(positions, dtype=torch.int64, device=plan.device())

    def measure(self, step: Step) -> None:
        """Fill in the norms of the averaged gradient, unscaled."""
        self.edits.compare_values(step)
        step.edited_on_device = self._sums.edited()
        step.gradients = self.gradients()
        # At the end of backward every gradient contains the scale of the loss.
        step.summary = self._arithmetic.unscaled(self.averaged(step.sequence), step.loss_scale)
        step.norm = step.summary.total

    def confirms_edit(self, *_: Any, **__: Any) -> bool:
        """Return that it is known: `compare` has compared values."""
        return True

    def measure_fallback(self, step: Step) -> None:
        """Fill in what a decision needs, by other means, where `measure` has failed on this rank."""
        step.edited_on_device = self._sums.edited()
        step.gradients = self.gradients()
        squares = self._sums.squares(self._positions)
        norm = self._arithmetic.number(squares.sum().sqrt() if step.gradients else squares.new_zeros(()))
        step.norm = norm if step.loss_scale is None else self._arithmetic.ratio(norm, step.loss_scale)

    def gradients(self) -> list[Tensor]:
        """Return this rank's shards of the gradients that exist, in the plan's order."""
        return [shard_of(g) for p in self.plan.parameters if (g := p.grad) is not None]

    def averaged(self, _: int) -> NormSummary:
        """Return the norms at the end of the newest backward pass; zeros if its gradients are gone."""
        squares = self._sums.squares(self._positions)
        if all(parameter.grad is None for parameter in self.plan.parameters):
            squares = torch.zeros_like(squares)
        norms: Norms
        (norms,) = self._arithmetic.rows(squares.sqrt_().unsqueeze(0))
        return self._arithmetic.summarize(norms, self._arrival)

    def updated(self, _: nn.Module) -> Measure | None:
        """Return the measure of the parameters that the optimizer holds by now; None if they are the same."""
        plan = updated_plan(self.plan, self._sums.named.items(), self._optimizer)
        if not plan.parameters or plan.index.keys() == self.plan.index.keys():
            return None
        measure = ShardedMeasure(plan, self._optimizer, self._arithmetic, self._control, self._sums)
        measure.edits.continue_from(self.edits)
        return measure
