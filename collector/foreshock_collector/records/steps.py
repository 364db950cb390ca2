"""A training step as detection and diagnosis see it, and the model that makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from foreshock_protos.v1 import telemetry_pb2 as pb

LARGEST = 1e150
"""Finite numbers are cut to this size where they are decoded, and those below its inverse become 0: their differences,
squares and ratios then stay finite."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Puts the ranks' records of one optimizer step together; `stepped` is False where no optimizer step followed.

    No dataclass: a frozen one takes ten times as long to make, and a collector makes thousands a second.
    """

    attempt: int
    sequence: int
    """Number of the step within its attempt, from 1. Steps are ordered by it; ranks step together, so theirs agree."""
    step: int
    """Number that the script gives it. Only a label: a resumed script may start at 12,000, another anew each epoch."""
    wall_seconds: float
    duration_seconds: float | None
    """Time since the step before, by the clock of one node; None if unknown."""
    learning_rate: float
    loss: float | None
    """Mean over ranks; None if the script observes no loss."""
    loss_scale: float
    global_norm: float
    """NaN if it was not measured, or is not finite: then `nan_gradient` or `inf_gradient` is True."""
    clip_coefficient: float
    skipped: bool
    nan_loss: bool
    inf_loss: bool
    nan_gradient: bool
    inf_gradient: bool
    ranks: int
    """Number of ranks that had reported the step when it was assembled."""
    stepped: bool = True
    """False if the optimizer was never called: the script's own guard, or a GradScaler, skipped the step."""
    shadow_clipped: bool = False
    """True if, in a dry run, the gradient would have been clipped."""
    shadow_skipped: bool = False
    """True if, in a dry run, the step would have been skipped."""
    measurements: Mapping[str, float] = msgspec.field(default_factory=dict)
    """Columns that are exported as they are, by name, as far as they were measured at this step."""

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """(source, kind) of everything that is not finite."""
        if not (self.nan_loss or self.inf_loss or self.nan_gradient or self.inf_gradient):
            return []
        found = (
            (self.nan_loss, ("loss", "nan")),
            (self.inf_loss, ("loss", "inf")),
            (self.nan_gradient, ("gradient", "nan")),
            (self.inf_gradient, ("gradient", "inf")),
        )
        return [what for is_so, what in found if is_so]

    @property
    def overflow(self) -> bool:
        """True if a GradScaler's scale drove a gradient beyond half precision: it skips the step and halves it."""
        return self._scaled and (self.nan_gradient or self.inf_gradient) and not (self.nan_loss or self.inf_loss)

    @property
    def update_skipped(self) -> bool:
        """True if the step was skipped on purpose, so that a NaN did no harm to the weights.

        A GradScaler skips steps while it searches for its scale, `skip` within its budget, a script by a guard of its
        own. A NaN in the loss has nothing to do with the scale.
        """
        if not self.stepped:
            return not (self._scaled and self.nan_loss)
        return (self.overflow and self.loss_scale >= 1) or (self.skipped and not self._scaled)

    @property
    def _scaled(self) -> bool:
        return self.loss_scale > 0 and self.loss_scale != 1.0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Describes the model, as the first Hello of an attempt does."""

    type: str = ""
    module_types: dict[str, int] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    parameter_sizes: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    parameter_layers: tuple[int, ...] = ()

    @classmethod
    def from_summary(cls, model: pb.ModelSummary) -> ModelFacts:
        """Decode the message."""
        return cls(
            type=model.type,
            module_types=dict(model.module_types),
            parameters=tuple(model.parameters),
            parameter_sizes=tuple(model.parameter_sizes),
            layers=tuple(model.layers),
            parameter_layers=tuple(model.parameter_layers),
        )

    def parameter(self, index: int) -> tuple[str, str]:
        """Return the names of a parameter and of its layer; empty for an index out of range."""
        if not 0 <= index < len(self.parameters):
            return "", ""
        return self.parameters[index], self.layers[self.parameter_layers[index]]


def bounded(value: float) -> float:
    """Cut a value to the range that calculations stay finite in; NaN and Inf stay what they are."""
    if not math.isfinite(value):
        return value
    return max(-LARGEST, min(value, LARGEST)) if abs(value) >= 1 / LARGEST else 0.0


def kind_of(value: float | None) -> str:
    """Return "nan" or "inf", which JSON and SQL have no number for; empty for all other values."""
    if value is None or math.isfinite(value):
        return ""
    return "nan" if math.isnan(value) else "inf"


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None
