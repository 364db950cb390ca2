"""The local norms of a job of one rank: its own gradient is the averaged one, and is not measured twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreshock._averaged import AveragedGradient
from foreshock._norms import NormSummary, Places, summarize
from foreshock._numbers import Number, finite
from foreshock._summary import ParameterPlan


class LoneRank:
    """Stands where `LocalNorms` stands with more ranks. What only the backward pass tells is the order of arrival."""

    def __init__(self, plan: ParameterPlan) -> None:
        self._plan = plan
        self._order: list[int] = []
        self._placed: tuple[Places, tuple[int, ...], Tensor, Places] | None = None

    def measure(self, parameters: Sequence[Tensor], _: Sequence[Tensor], *, first: bool) -> None:
        """One bucket, in the order of arrival."""
        if first:
            self._order = []
        index = self._plan.index
        self._order += [index[p] for p in parameters if p in index]

    def own(self, averaged: AveragedGradient, summary: NormSummary, _: Number | None) -> NormSummary:
        """This rank's gradient. summary: of the averaged one, which `averaged` has measured last; both unscaled."""
        if finite(summary.total) is True:
            return summary
        norms, places = averaged.norms, averaged.places
        positions, arrived = self._arrival(places)
        if isinstance(norms, Tensor):
            return replace(summary, first_nonfinite=summarize(norms[positions], arrived).first_nonfinite)
        in_order = [norms[i] for i in positions.tolist()]
        return replace(summary, first_nonfinite=summarize(in_order, arrived).first_nonfinite)

    def _arrival(self, places: Places) -> tuple[Tensor, Places]:
        """Where norms lie among those at `places`, in the order of arrival, int64, [n]; and which they are then."""
        order = tuple(self._order)
        if self._placed is None or self._placed[0] is not places or self._placed[1] != order:
            position = {parameter: i for i, parameter in enumerate(places.parameters)}
            there = tuple(parameter for parameter in order if parameter in position)
            positions = torch.tensor([position[p] for p in there], dtype=torch.int64, device=places.device)
            self._placed = places, order, positions, self._plan.places(there)
        return self._placed[2], self._placed[3]
