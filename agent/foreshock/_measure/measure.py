"""Measures one step: the averaged gradient, this rank's own, and now and then the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Norms, NormSummary, Number
from foreshock._arithmetic.parameters import ParameterLayout, ParameterPlan, averaged_parameters, updated_plan
from foreshock._control.optimizer import OptimizerControl
from foreshock._measure.local import LocalNorms
from foreshock._measure.script import GradientEdits
from foreshock._measure.weights import Weights, due
from foreshock._step import Step


class Measure:
    """Measures the parameters of one plan. Replaced when the optimizer holds other parameters."""

    def __init__(
        self,
        plan: ParameterPlan,
        optimizer: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        control: OptimizerControl,
        *,
        local_norms: bool,
        single: bool,
        views: bool,
    ) -> None:
        """single: the job has one rank, whose own gradient is the averaged one. views: of DDP's buckets."""
        self._optimizer = optimizer
        self._arithmetic = arithmetic
        self._control = control
        self._options = {"local_norms": local_norms, "single": single, "views": views}
        self._of_averaged = local_norms and single
        self.plan = plan
        self.edits = GradientEdits(plan.parameters, arithmetic, views=views)
        self.local = LocalNorms(plan, arithmetic) if local_norms and not single else None
        self.at_end: NormSummary | None = None
        """Summary of the averaged gradient at the end of the newest backward pass, where that was measured; it contains
        the loss scale."""
        self.norm_at_end: Number | None = None
        """Its norm by other means, where measuring it has failed on this rank."""
        self._weights = Weights(plan, optimizer, arithmetic)
        self._all = tuple(range(len(plan.parameters)))
        self._layout = plan.layout(self._all)
        self._norms: Norms = arithmetic.zeros(0)
        """Norm of each parameter that had a gradient when the averaged gradient was measured last."""
        self._learned: dict[int, None] = {}
        """Parameters in the order in which their gradients were seen to arrive."""
        self.order = self._all[::-1]
        """All parameters in the order of arrival: at first the reverse of the model's, which is usually true."""
        self._arrived: tuple[ParameterLayout, tuple[int, ...], Tensor, ParameterLayout] | None = None

    def measure(self, step: Step) -> None:
        """Fill in the norms of the averaged gradient and of this rank's own, unscaled, and measures of the weights."""
        # At the end of backward every gradient contains the scale of the loss.
        scale, summary = step.loss_scale, self.at_end
        if summary is None or (self.edits.compares and not step.edited):
            step.gradients = self.gradients()
            now = self._summarize(step.gradients, step.sequence)
            if summary is None or not self.edits.differ(step, summary.total, now.total):
                scale, summary = step.grad_scale, now
        else:
            step.gradients = self.gradients()
        step.summary = summary if scale is None else self._arithmetic.unscaled(summary, scale)
        step.norm = step.summary.total
        step.weights = self._weights.measure_due(step.sequence)
        self.measure_local(step, step.summary)

    def measure_at_end(self, sequence: int) -> NormSummary:
        """Measure the averaged gradient as backward has left it. sequence: of the record it is for."""
        self.at_end = self.norm_at_end = None
        try:
            self.at_end = self.averaged(sequence)
        except Exception:
            # What it is for, `confirms_edit`, must have one answer on all ranks.
            self.norm_at_end = self._norm_fallback()
            raise
        return self.at_end

    def confirms_edit(self, step: Step, *, fallback: bool = False) -> bool:
        """Return whether the script is known to have edited the gradients of a step whose `edited` is set.

        Unsets that where only their version has changed. A device would answer too late: there, a version counts.
        fallback: by other means, since this has failed on this rank.
        """
        edits, arithmetic = self.edits, self._arithmetic
        if edits.by_norm or edits.seen or not edits.by_version or not edits.on_host:
            return True
        before = self.norm_at_end if self.at_end is None else self.at_end.total
        if before is None:
            # The first new version, in the middle of a run: there is nothing to compare with yet.
            return False
        edits.compares = False
        self._control.read(step)
        now = self._norm_fallback() if fallback else arithmetic.total(arithmetic.norms(self.gradients()))
        step.edited = edits.changed(step, float(before), float(now))
        return step.edited

    def measure_fallback(self, step: Step) -> None:
        """Fill in what a decision needs, by other means, where `measure` has failed on this rank."""
        step.gradients, norm = self.gradients(), self._norm_fallback()
        step.norm = norm if step.grad_scale is None else self._arithmetic.ratio(norm, step.grad_scale)

    def gradients(self) -> list[Tensor]:
        """Return the gradients that exist, in the plan's order."""
        return [g for p in self.plan.parameters if (g := p.grad) is not None]

    def averaged(self, sequence: int) -> NormSummary:
        """Return the norms of the averaged gradient as it is now. sequence: of the record it is for."""
        return self._summarize(self.gradients(), sequence)

    def _summarize(self, gradients: list[Tensor], sequence: int) -> NormSummary:
        # Keeps no gradient: that would double their memory in the next backward pass.
        present = self._all
        if len(gradients) < len(present):
            present = tuple(i for i in present if self.plan.parameters[i].grad is not None)
        if self._layout.parameters != present:
            self._layout = self.plan.layout(present)
        self._norms = self._arithmetic.norms(gradients)
        summary = self._arithmetic.summarize(self._norms, self._layout)
        if gradients and due(sequence):
            return replace(summary, largest=self._arithmetic.largest(self._arithmetic.maxima(gradients)))
        return summary

    def arrived(self, parameter: Tensor) -> None:
        """Learn the order in which gradients arrive."""
        index = self.plan.index.get(parameter)
        if index is not None and index not in self._learned:
            self._learned[index] = None
            self.order = (*self._learned, *(i for i in reversed(self._all) if i not in self._learned))

    def measure_local(self, step: Step, summary: NormSummary) -> None:
        """Fill in the norms of this rank's own gradient, unscaled.

        summary: of the averaged gradient, unscaled, as `averaged` has measured it last; a single rank's own.
        """
        if self.local is not None:
            # Taken once: if the next pass cannot be measured, it has none.
            step.local, self.local.summary = self.local.summary, None
            if step.local is not None and step.loss_scale is not None:
                step.local = self._arithmetic.unscaled(step.local, step.loss_scale)
        elif self._of_averaged:
            step.local = summary
            if self._arithmetic.finite(summary.total) is not True:
                positions, layout = self._in_order_of_arrival()
                arrived = self._arithmetic.summarize(self._arithmetic.taken(self._norms, positions), layout)
                step.local = replace(summary, first_nonfinite=arrived.first_nonfinite)

    def updated(self, model: nn.Module) -> Measure | None:
        """Return the measure of the parameters that the optimizer holds by now; None if they are the same."""
        plan = updated_plan(self.plan, averaged_parameters(model), self._optimizer)
        if not plan.parameters or plan.index.keys() == self.plan.index.keys():
            return None
        measure = self._like(plan)
        measure.edits.continue_from(self.edits)
        for index in self._learned:
            measure.arrived(self.plan.parameters[index])
        return measure

    def _norm_fallback(self) -> Number:
        """Return the norm of the gradients as they are now, by torch alone."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients()]
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
        return self._arithmetic.number(total)

    def _like(self, plan: ParameterPlan) -> Measure:
        """Return a measure of another plan."""
        return Measure(plan, self._optimizer, self._arithmetic, self._control, **self._options)

    def _in_order_of_arrival(self) -> tuple[Tensor, ParameterLayout]:
        """Return the positions of the newest norms, int64, [n], in the order of arrival, and their layout then."""
        if self._arrived is None or self._arrived[0] is not self._layout or self._arrived[1] is not self.order:
            position = {parameter: i for i, parameter in enumerate(self._layout.parameters)}
            order = tuple(parameter for parameter in self.order if parameter in position)
            positions = torch.tensor([position[p] for p in order], dtype=torch.int64, device=self.plan.device())
            self._arrived = self._layout, self.order, positions, self.plan.layout(order)
        return self._arrived[2], self._arrived[3]
