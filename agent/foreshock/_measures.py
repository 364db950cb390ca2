"""What is measured of the parameters of one plan: made anew when the optimizer comes to hold others."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from foreshock._alone import LoneRank
from foreshock._averaged import AveragedGradient
from foreshock._edits import GradientEdits
from foreshock._local import LocalNorms
from foreshock._norms import NormSummary
from foreshock._numbers import Number
from foreshock._summary import ParameterPlan, follow, trainable
from foreshock._weights import Weights, due


class Measures:
    """Of one rank."""

    def __init__(
        self, plan: ParameterPlan, optimizer: torch.optim.Optimizer, *, local_norms: bool, alone: bool, views: bool
    ) -> None:
        """alone: the job has one rank. views: gradients are views of DDP's buckets."""
        self._optimizer = optimizer
        self._held = _identities(optimizer)
        self._options = {"local_norms": local_norms, "alone": alone, "views": views}
        self.plan = plan
        self.averaged = AveragedGradient(plan)
        self.weights = Weights(plan, optimizer)
        self.edits = GradientEdits(plan.parameters, views=views)
        self.local: LocalNorms | LoneRank | None = (LoneRank if alone else LocalNorms)(plan) if local_norms else None
        self.at_end: NormSummary | None = None
        """Of the averaged gradient as the newest backward pass left it, as far as that was measured: with the scale
        of the loss."""

    def measure(self, sequence: int) -> NormSummary:
        """Of the averaged gradient as it is now. sequence: of the record that it is for."""
        return self.averaged.measure(self.averaged.gradients(), largest=due(sequence))

    def own(self, summary: NormSummary, scale: Number | None) -> NormSummary | None:
        """Of this rank's own gradient, unscaled. summary: of the averaged one."""
        return None if self.local is None else self.local.own(self.averaged, summary, scale)

    def followed(self, model: DistributedDataParallel) -> Measures | None:
        """Those of the parameters that the optimizer holds by now; None where they are the same."""
        held = _identities(self._optimizer)
        if held == self._held:
            return None
        self._held = held
        plan = follow(self.plan, model.module, self._optimizer, model.parameters_to_ignore)
        if not plan.parameters or plan.index.keys() == self.plan.index.keys():
            return None
        return Measures(plan, self._optimizer, **self._options)


def _identities(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for parameter in trainable(optimizer)]
