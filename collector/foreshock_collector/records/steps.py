"""What a step is, as detection and diagnosis see it, and what is known of the model that makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from foreshock_protos.v1 import telemetry_pb2 as pb

LARGEST = 1e150
"""Finite numbers are cut to this size where they come in, and those below its inverse become 0: differences, squares
and ratios of what is left stay finite."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of the run, or what was told or measured without one: its ranks put together."""

    attempt: int
    sequence: int
    """Number of the step within its attempt, from 1: what orders steps. Ranks step together, so theirs agree."""
    step: int
    """What the script calls it. A label: a resumed script starts at 12,000, a careless one anew each epoch."""
    wall_seconds: float
    duration_seconds: float | None
    """Since the step before, by the clock of one node; None where that is not known."""
    learning_rate: float
    loss: float | None
    """Mean over ranks; None if the script tells no loss."""
    loss_scale: float
    global_norm: float
    """NaN: not finite, which `nan_gradient` says, or not measured."""
    clip_coefficient: float
    skipped: bool
    nan_loss: bool
    inf_loss: bool
    nan_gradient: bool
    inf_gradient: bool
    ranks: int
    """How many had reported it when it was put together."""
    stepped: bool = True
    """False: the optimizer was never called. The script's own guard, or a GradScaler, has left the step out."""
    shadow_clipped: bool = False
    """In shadow mode: would have been clipped."""
    shadow_skipped: bool = False
    """In shadow mode: would have been left out."""
    gradient_absolute_maximum: float | None = None
    """Largest element of the averaged gradient, unscaled. This and the next two: on one step in a hundred."""
    parameter_norm: float | None = None
    update_ratio: float | None = None
    """How far the step before moved the weights, over their norm."""

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """(source, kind) of all that is not finite."""
        found = (
            (self.nan_loss, ("loss", "nan")),
            (self.inf_loss, ("loss", "inf")),
            (self.nan_gradient, ("gradient", "nan")),
            (self.inf_gradient, ("gradient", "inf")),
        )
        return [what for is_so, what in found if is_so]

    @property
    def overflow(self) -> bool:
        """The scale of a GradScaler drove a gradient beyond half precision: it leaves the step out, and halves."""
        return self._scaled and (self.nan_gradient or self.inf_gradient) and not (self.nan_loss or self.inf_loss)

    @property
    def left_out(self) -> bool:
        """So that it did no harm: by a GradScaler that looks for its scale, by `skip`, which has a budget, or by the
        script itself. A NaN in the loss is no matter of scale.
        """
        if not self.stepped:
            return not (self._scaled and self.nan_loss)
        return (self.overflow and self.loss_scale >= 1) or (self.skipped and not self._scaled)

    @property
    def _scaled(self) -> bool:
        return self.loss_scale > 0 and self.loss_scale != 1.0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model summary of an attempt's first Hello."""

    type: str = ""
    module_types: dict[str, int] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    parameter_sizes: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    parameter_layers: tuple[int, ...] = ()

    @classmethod
    def from_summary(cls, model: pb.ModelSummary) -> ModelFacts:
        """Decode."""
        return cls(
            type=model.type,
            module_types=dict(model.module_types),
            parameters=tuple(model.parameters),
            parameter_sizes=tuple(model.parameter_sizes),
            layers=tuple(model.layers),
            parameter_layers=tuple(model.parameter_layers),
        )

    def parameter(self, index: int) -> tuple[str, str]:
        """Names of a parameter and of its layer; empty for an index that there is not."""
        if not 0 <= index < len(self.parameters):
            return "", ""
        return self.parameters[index], self.layers[self.parameter_layers[index]]


def bounded(value: float) -> float:
    """The value, cut to what one can calculate with; NaN and Inf stay what they are."""
    if not math.isfinite(value):
        return value
    return max(-LARGEST, min(value, LARGEST)) if abs(value) >= 1 / LARGEST else 0.0


def kind_of(value: float | None) -> str:
    """What JSON and SQL have no number for: "nan" or "inf"; empty for all others."""
    if value is None or math.isfinite(value):
        return ""
    return "nan" if math.isnan(value) else "inf"


def finite(value: float | None) -> float | None:
    """The value, or None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None
