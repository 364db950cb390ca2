"""Stages of a step whose numbers the kernels compute: each stands for the stage of the same name without `Kernel`.

The kernels compute everything from the norms to the record in two launches, so `KernelMeasure` launches the first of
them and `KernelDecide` the second. `KernelApply` gives the optimizer what that has written. Nothing is read back.

Where one of them fails on this rank, the step is decided by tensor operations, from the same history and budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import NormSummary, Number
from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._control.apply import Apply, DryRun
from foreshock._control.optimizer import OptimizerControl
from foreshock._kernels.launches import Measurement, OrderedSums, StepKernel
from foreshock._kernels.tables import ChunkTable, GradientSums, ParameterOrder
from foreshock._measure.local import LocalNorms
from foreshock._measure.measure import Measure
from foreshock._measure.rank_sums import LocalGradient, RankSums
from foreshock._measure.weights import due
from foreshock._step import Step, StepDecision
from foreshock._torch import foreach_multiply_


class KernelLocalNorms(LocalNorms):
    """Measures this rank's own gradient in one launch."""

    def __init__(self, plan: ParameterPlan, arithmetic: Arithmetic, table: ChunkTable) -> None:
        self._sums = GradientSums(table)
        self._placed = ParameterOrder(range(table.parameters), plan.numbers, table.device)
        self._has = False
        super().__init__(plan, arithmetic)

    def measure(self, order: Sequence[int]) -> None:
        self._has = False
        if self._placed.order is not order:
            self._placed = ParameterOrder(order, self._plan.numbers, self._plan.device())
        gradients = [parameter.grad for parameter in self._plan.parameters]
        if any(gradient is not None for gradient in gradients):
            self._sums.measure(gradients)
            self._has = True

    @property
    def newest(self) -> OrderedSums | None:
        """The newest measurement; None if it has failed, was taken, or is of no gradient."""
        return OrderedSums(self._sums, self._placed) if self._has else None

    def take(self) -> OrderedSums | None:
        """Return the newest measurement, once: if the next pass cannot be measured, it has none."""
        newest, self._has = self.newest, False
        return newest

    @property
    def summary(self) -> NormSummary | None:
        """Summary of the newest backward pass, made when it is asked for: a step's record does without."""
        if not self._has:
            return None
        order = tuple(self._placed.order)
        layout = self._layout if self._layout.parameters == order else self._layout_of(order)
        # The places of all, sorted, are the positions in the order of arrival.
        norms = self._arithmetic.taken(self._sums.norms(), self._placed.positions.argsort())
        return self._arithmetic.summarize(norms, layout)

    @summary.setter
    def summary(self, value: NormSummary | None) -> None:
        assert value is None
        self._has = False


class KernelRankSums(RankSums):
    """Sums over ranks what the kernels have measured: a rank's part goes straight into the buffer."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, arithmetic: Arithmetic, kernel: StepKernel
    ) -> None:
        super().__init__(group, device, arithmetic)
        self._kernel = kernel

    def _fill(self, values: Tensor, local: LocalGradient | None, loss: Number | None) -> None:
        newest = local.newest if isinstance(local, KernelLocalNorms) else None
        if newest is None:
            values.copy_(self.contribution(None, loss))
        else:
            self._kernel.contribute(newest, loss, values)


class KernelMeasure(Measure):
    """Measures the parameters of one plan, all in one launch."""

    def __init__(
        self,
        plan: ParameterPlan,
        optimizer: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        control: OptimizerControl,
        *,
        kernel: StepKernel,
        **options: Any,
    ) -> None:
        super().__init__(plan, optimizer, arithmetic, control, **options)
        self._kernel = kernel
        table = ChunkTable(plan)
        self._sums = GradientSums(table)
        self._in_order = ParameterOrder(self._all, plan.numbers, table.device)
        self._by_arrival = self._in_order
        if self.local is not None:
            self.local = KernelLocalNorms(plan, arithmetic, table)

    def measure(self, step: Step) -> None:
        """Launch the measurement of the averaged gradient; measure the weights."""
        kernel, at_end = self._kernel, self.at_end
        largest: Number | None = None
        if at_end is None or (self.edits.compares and not step.edited):
            step.gradients = self._launch()
            largest = self._largest(step.gradients, step.sequence)
            if at_end is not None:
                self.edits.differ(step, at_end.total, self._arithmetic.total(self._sums.norms()))
                at_end = None
        else:
            step.gradients, largest = self.gradients(), at_end.largest
        step.weights = self._weights.measure_due(step.sequence)
        # At the end of backward every gradient contains the scale of the loss.
        kernel.measured = Measurement(
            averaged=OrderedSums(self._sums, self._in_order),
            local=self._take_local(),
            carried=step.grad_scale if at_end is None else step.loss_scale,
            largest=largest,
        )

    def averaged(self, sequence: int) -> NormSummary:
        """Return the norms of the averaged gradient as it is now, from one launch and tensor operations on its sums."""
        gradients = self._launch()
        self._norms = self._sums.norms()
        summary = self._arithmetic.summarize(self._norms, self._layout)
        largest = self._largest(gradients, sequence)
        return summary if largest is None else replace(summary, largest=largest)

    def _launch(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self.plan.parameters]
        self._kernel.measure(self._sums, gradients)
        return [gradient for gradient in gradients if gradient is not None]

    def _largest(self, gradients: list[Tensor], sequence: int) -> Number | None:
        if not gradients or not due(sequence):
            return None
        return self._arithmetic.largest(self._arithmetic.maxima(gradients))

    def _take_local(self) -> OrderedSums | None:
        if isinstance(self.local, KernelLocalNorms):
            return self.local.take()
        if not self._of_averaged:
            return None
        if self._by_arrival.order is not self.order:
            self._by_arrival = ParameterOrder(self.order, self.plan.numbers, self.plan.device())
        return OrderedSums(self._sums, self._by_arrival)

    def _like(self, plan: ParameterPlan) -> Measure:
        return KernelMeasure(
            plan, self._optimizer, self._arithmetic, self._control, kernel=self._kernel, **self._options
        )


class KernelApply(Apply):
    """Applies what the kernels have decided."""

    def __init__(self, arithmetic: Arithmetic, control: OptimizerControl, kernel: StepKernel) -> None:
        super().__init__(arithmetic, control, None)
        self._kernel = kernel

    def apply(self, step: Step) -> None:
        """Clip or skip as decided."""
        decision, control, kernel = step.decision, self._control, self._kernel
        assert decision is not None
        divides = decision.divisor is not None and control.can_divide()
        # Whatever may fail comes before this: gradients are touched last, once.
        if decision.skip is not None:
            control.guard_momentum()
            control.override("found_inf", kernel.skips)
        if divides:
            control.override("grad_scale", kernel.divisor)
        elif decision.divisor is not None:
            foreach_multiply_(step.gradients, kernel.coefficient)

    def apply_fallback(self, step: Step) -> None:
        decision = step.decision
        assert decision is not None
        if step.words is not None:
            # The numbers of the tensor operations, where the optimizer's own scale is no part of the divisor.
            divisor = None if decision.divisor is None else self._arithmetic.ratio(1.0, self._kernel.coefficient)
            skip = None if decision.skip is None else self._kernel.skips > 0
            step.decision = StepDecision(divisor=divisor, skip=skip)
        super().apply_fallback(step)


class KernelDryRun(DryRun):
    """Applies nothing: the kernels count what would have been done."""

    def __init__(self, arithmetic: Arithmetic, control: OptimizerControl, kernel: StepKernel) -> None:
        super().__init__(arithmetic, control, None)
        self._kernel = kernel

    def apply(self, _: Step) -> None:
        """Count the step."""
        self._steps += 1

    def counts(self) -> dict[str, int]:
        clipped, skipped = self._kernel.dry_run_counts()
        return {"steps": self._steps, "clipped": clipped, "skipped": skipped}
