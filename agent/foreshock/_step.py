"""One optimizer step on its way through the probe: measure, decide, apply, record. Each stage fills in its part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from foreshock._arithmetic.norms import Flag, NormSummary, Number, WeightSummary


class Observation(NamedTuple):
    """Holds the arguments of one `observe`."""

    step: int | None
    loss: Number | None


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """Says what is done to one step."""

    divisor: Number | None = None
    """What divides the whole gradient, at least 1; None if the gradient is not scaled."""
    skip: Flag | None = None
    """Whether the optimizer leaves the parameters unchanged; None if skipping is off."""


@dataclass(kw_only=True)
class Step:
    """Holds what is known of one step, or of a backward pass that no step followed."""

    sequence: int
    """Number of its record, from 1."""
    number: int
    """Step number of the script, or counted."""
    learning_rate: float = math.nan
    observation: Observation | None = None
    """What the script has observed of it."""
    flags: int = 0
    """EDITED, NOT_STEPPED, GRADIENT_UNKNOWN, as the ring numbers them."""
    edited: bool = False
    """Whether the script has changed the gradients since the end of backward."""
    edited_on_device: Flag | None = None
    """Whether the script has changed any before, as the ranks of a sharded model agree; None for DDP."""

    grad_scale: Number | None = None
    """Loss scale that the gradients still contain; None if they contain none."""
    loss_scale: Number | None = None
    """Factor of the loss in this step's backward pass; None without a `GradScaler`."""
    gradients: list[Tensor] = field(default_factory=list)
    """Averaged gradients that the optimizer will use."""
    norm: Number | None = None
    """L2 norm of the averaged gradient, unscaled."""
    summary: NormSummary | None = None
    """Norms of the averaged gradient, unscaled and from before the script's own edits."""
    local: NormSummary | None = None
    """Norms of this rank's own gradient, unscaled; None if not measured."""
    weights: WeightSummary | None = None
    """What was measured of the weights; None on the steps that measure nothing."""

    decision: StepDecision | None = None
    """What is done to the step; None before that is decided."""
    coefficient: Number | None = None
    """Factor by which the gradient was multiplied; None if it was not scaled."""
    found_inf: Number | None = None
    """Not zero where the optimizer skips the step; None if nothing can skip it."""
    shadow: Number | None = None
    """Column `shadow`: what a dry run would have done."""

    words: Tensor | None = None
    """Measured and observed part as the ring lays them out, where kernels have written them on the device: int64."""
    begun: bool = False
    """Whether the ring has a record of it."""
    complete: bool = False
    """Whether each stage before the record has succeeded, so that the record can be whole."""
