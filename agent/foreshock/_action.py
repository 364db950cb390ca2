"""What is done about a step: ruled, then clipped or left out; or, in shadow mode, only counted."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from foreshock._averaged import AveragedGradient
from foreshock._clip import Clip
from foreshock._kernel import Kernel
from foreshock._numbers import Number
from foreshock._policies import Policies, Ruling
from foreshock._shadow import Shadow


class Action:
    """Of one rank."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Collection[Tensor],
        *,
        clip: Clip | None,
        skip: bool,
        shadow: bool,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self.policies = Policies(clip=clip, skip=skip, device=device)
        self.kernel = Kernel(optimizer, clip, parameters)
        self.shadow = Shadow(clip, device) if shadow else None

    def learning_rate(self) -> float:
        """Of the first parameter group; NaN where it is not known on the host."""
        rate = self._optimizer.param_groups[0]["lr"]
        # A tensor on a device would have to be waited for.
        return float(rate) if not isinstance(rate, Tensor) or rate.is_cpu else math.nan

    def rule(self, norm: Number, rate: float, *, edited: bool) -> Ruling:
        """norm: of the averaged gradient, unscaled. edited: the script has changed it since."""
        ruling = self.policies.rule(norm, learning_rate=rate, left_out=self.kernel.found_inf)
        # What the script has clipped is not clipped again; it may be left out all the same.
        return Ruling(skip=ruling.skip) if edited else ruling

    def follow(
        self, ruling: Ruling, gradients: list[Tensor], scale: Number | None
    ) -> tuple[Number | None, Number | None]:
        """Do what was ruled, or only count it: the clip coefficient, and the column `shadow`."""
        if self.shadow is not None:
            return None, self.shadow.count(ruling, gradients, scale)
        return self.kernel.follow(ruling, gradients, scale), None

    def follow_plainly(self, ruling: Ruling | None, averaged: AveragedGradient, rate: float, *, edited: bool) -> None:
        """Where that has failed on this rank: the same by other means, to rounding. ruling: None if it came to none."""
        scale = self.kernel.scale
        if ruling is None:
            ruling = self.rule(averaged.plain_norm(scale), rate, edited=edited)
        if self.shadow is None:
            self.kernel.follow_plainly(ruling, averaged.gradients(), scale)
