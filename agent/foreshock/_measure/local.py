"""This rank's own gradient, before the all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Norms, NormSummary
from foreshock._arithmetic.parameters import ParameterLayout, ParameterPlan


class LocalNorms:
    """Measures the gradients of one backward pass: all at once, or bucket by bucket."""

    def __init__(self, plan: ParameterPlan, arithmetic: Arithmetic) -> None:
        self._plan = plan
        self._arithmetic = arithmetic
        self._norms: list[Norms] = []
        self._order: list[int] = []
        self._whole = True
        self._layout = plan.layout(())
        self.summary: NormSummary | None = None
        """Summary of the newest backward pass; None before the first, without any of our parameters, or if a part has
        failed."""

    def measure(self, order: Sequence[int]) -> None:
        """Measure all gradients at once. order: of arrival, as positions in the plan."""
        gradients, present = [], []
        for position in order:
            gradient = self._plan.parameters[position].grad
            if gradient is not None:
                gradients.append(gradient)
                present.append(position)
        self.summary = None
        if gradients:
            layout = self._layout_of(tuple(present)) if self._layout.parameters != tuple(present) else self._layout
            self.summary = self._arithmetic.summarize(self._arithmetic.norms(gradients), layout)

    def add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """Measure some parameters' gradients, given in the order of arrival. first: part of a backward pass."""
        if first:
            # A backward pass that raised has left its part behind.
            self._norms, self._order, self._whole = [], [], True
        # Stays false if this part fails: a norm without it would look like a small gradient.
        whole, self._whole = self._whole, False
        index = self._plan.index
        ours = [(index[p], g) for p, g in zip(parameters, gradients, strict=True) if p in index]
        if ours:
            self._norms.append(self._arithmetic.norms([g for _, g in ours]))
            self._order += [i for i, _ in ours]
        self._whole = whole

    def close(self) -> None:
        """Sum up after the last part."""
        norms, order = self._norms, tuple(self._order)
        self._norms, self._order, self.summary = [], [], None
        if norms and self._whole:
            layout = self._layout_of(order) if self._layout.parameters != order else self._layout
            self.summary = self._arithmetic.summarize(self._arithmetic.joined(norms), layout)

    def _layout_of(self, order: tuple[int, ...]) -> ParameterLayout:
        """Change the layout. Rare: when DDP rebuilds its buckets, or where parameters are unused."""
        self._layout = self._plan.layout(order)
        return self._layout
