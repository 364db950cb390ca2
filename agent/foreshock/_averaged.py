"""The averaged gradient of one step: the same on every rank, as the optimizer is about to see it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foreshock._norms import Norms, NormSummary, gradient_maxima, gradient_norms, largest_of, summarize
from foreshock._numbers import Number, number, ratio
from foreshock._summary import ParameterPlan


class AveragedGradient:
    """Of the parameters of a plan."""

    def __init__(self, plan: ParameterPlan) -> None:
        self._plan = plan
        self._device = plan.device()
        self._all = tuple(range(len(plan.parameters)))
        self.places = plan.places(self._all)
        self.norms: Norms = []
        """Of each parameter that has a gradient, and which those are: as `measure` found them last."""

    def measure(self, gradients: list[Tensor], *, largest: bool) -> NormSummary:
        """Norms of `gradients()` as they are now, scaled where the loss was. largest: their largest element as well."""
        self._place(len(gradients))
        self.norms = gradient_norms(gradients, self._device)
        summary = summarize(self.norms, self.places)
        if not largest or not gradients:
            return summary
        return replace(summary, largest=largest_of(gradient_maxima(gradients, self._device)))

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [g for p in self._plan.parameters if (g := p.grad) is not None]

    def plain_norm(self, scale: Number | None) -> Number:
        """The norm by other means than `measure`, unscaled: where that has failed on this rank."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients()]
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
        return number(total) if scale is None else ratio(number(total), scale)

    def _place(self, count: int) -> None:
        present = self._all
        if count < len(present):
            present = tuple(i for i, p in enumerate(self._plan.parameters) if p.grad is not None)
        if self.places.parameters != present:
            self.places = self._plan.places(present)
