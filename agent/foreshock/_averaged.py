"""The averaged gradient of one step: the same on every rank, as the optimizer is about to see it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foreshock._norms import NormSummary, gradient_maxima, gradient_norms, summarize
from foreshock._summary import ParameterPlan


class AveragedGradient:
    """Of the parameters of a plan."""

    def __init__(self, plan: ParameterPlan) -> None:
        self._plan = plan
        self._device = plan.device()
        self._indices: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def measure(self, *, largest: bool) -> NormSummary:
        """Its norms, as they are now: scaled where the loss was. largest: its largest element as well."""
        present = tuple(i for i, p in enumerate(self._plan.parameters) if p.grad is not None)
        if self._indices is None or self._indices[0] != present:
            layer_of = torch.tensor([self._plan.layer_of[i] for i in present], dtype=torch.int64, device=self._device)
            self._indices = (present, torch.tensor(present, dtype=torch.int64, device=self._device), layer_of)
        gradients = self.gradients()
        norms = gradient_norms(gradients).to(self._device)
        summary = summarize(norms, self._indices[1], self._indices[2], len(self._plan.layers))
        if not largest or not gradients:
            return summary
        return replace(summary, largest=gradient_maxima(gradients).max().to(self._device))

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self._plan.parameters if p.grad is not None]

    def plain_norm(self, scale: Tensor | None) -> Tensor:
        """The norm by other means than `measure`, float64 scalar, unscaled: where that has failed on this rank."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients()]
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
        return total if scale is None else total / scale
