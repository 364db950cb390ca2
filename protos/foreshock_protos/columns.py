"""The table of columns: every number that a rank records at each step.

A column has one name wherever it appears: in the rank's ring, as a field of `StepBatch`, in the collector's records and
in the API. The ring's measured part, the packing of batches, the collector's record type and its gauges follow from
this table. Standard library only: the probe imports it into the training process.

A new column takes a line here, a field of the same name in telemetry.proto, and the module of the probe that measures
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """The part of a record that carries a column, by who writes it and when."""

    BEGUN = "begun"
    """Known to the host when the step begins."""
    OBSERVED = "observed"
    """Observed by the script, before or after the step."""
    MEASURED = "measured"
    """Measured on the device: this rank's values, or those of the averaged gradient, which all ranks share."""
    REDUCED = "reduced"
    """Brought by the newest finished all-reduce over the ranks; measured in the ring's sense as well."""


class Nonfinite(Enum):
    """Says how a column shows that something in its record is NaN or Inf."""

    VALUE = "value"
    """The value itself is NaN or Inf."""
    COUNT = "count"
    """The value counts what is NaN or Inf, and is above zero."""


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """The Prometheus gauge that exports the newest finite value of a column."""

    series: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of a step's record. The ring and the wire hold every measured column as float64."""

    name: str
    part: Part = Part.MEASURED
    unit: str = ""
    """Base unit, empty for a plain number."""
    integer: bool = False
    """The collector keeps it as an int64."""
    missing: float = 0.0
    """What the probe writes where it has measured nothing."""
    optional: bool = False
    """True where `missing` is never a measurement: a step without one exports nothing, and the batches of a recorder
    that does not know the column may leave it out."""
    on_wire: bool = True
    """False where the recorder sends it as bits of `flags`, and `StepBatch` has no such field."""
    nonfinite: Nonfinite | None = None
    gauge: Gauge | None = None


COLUMNS: tuple[Column, ...] = (
    Column(
        name="step",
        part=Part.BEGUN,
        integer=True,
        gauge=Gauge(series="foreshock_step", help="The newest optimizer step."),
    ),
    Column(name="wall_seconds", part=Part.BEGUN, unit="seconds"),
    Column(name="monotonic_seconds", part=Part.BEGUN, unit="seconds"),
    Column(
        name="learning_rate",
        part=Part.BEGUN,
        gauge=Gauge(
            series="foreshock_learning_rate",
            help="Learning rate of the first parameter group at the newest step.",
        ),
    ),
    Column(name="flags", part=Part.BEGUN, integer=True),
    Column(
        name="loss",
        part=Part.OBSERVED,
        nonfinite=Nonfinite.VALUE,
        gauge=Gauge(series="foreshock_loss", help="Loss averaged over ranks, at the newest finite step."),
    ),
    Column(
        name="loss_scale",
        missing=1.0,
        gauge=Gauge(
            series="foreshock_loss_scale", help="Scale of the GradScaler at the newest step; 1 without a scaler."
        ),
    ),
    Column(
        name="global_norm",
        nonfinite=Nonfinite.VALUE,
        gauge=Gauge(
            series="foreshock_global_gradient_norm",
            help="L2 norm of the averaged gradient before clipping, at the newest finite step.",
        ),
    ),
    Column(
        name="clip_coefficient",
        unit="ratio",
        missing=1.0,
        gauge=Gauge(
            series="foreshock_clip_coefficient",
            help="Factor in (0, 1] applied to the averaged gradient at the newest step.",
        ),
    ),
    Column(name="local_norm", nonfinite=Nonfinite.VALUE),
    Column(name="global_nan_parameters", nonfinite=Nonfinite.COUNT),
    Column(name="global_inf_parameters", nonfinite=Nonfinite.COUNT),
    Column(name="local_nan_parameters", nonfinite=Nonfinite.COUNT),
    Column(name="local_inf_parameters", nonfinite=Nonfinite.COUNT),
    Column(name="first_nonfinite_global", integer=True, missing=-1.0),
    Column(name="first_nonfinite_local", integer=True, missing=-1.0),
    Column(name="skipped", on_wire=False),
    Column(name="shadow", on_wire=False),
    Column(name="parameter_fingerprint", missing=-1.0, optional=True),
    Column(
        name="gradient_absolute_maximum",
        optional=True,
        gauge=Gauge(
            series="foreshock_gradient_absolute_maximum",
            help="Largest absolute element of the averaged gradient before clipping, measured every hundred steps.",
        ),
    ),
    Column(
        name="parameter_norm",
        optional=True,
        gauge=Gauge(
            series="foreshock_parameter_norm",
            help="L2 norm of the weights before the newest measured step, estimated from a sample of their elements.",
        ),
    ),
    Column(
        name="update_ratio",
        unit="ratio",
        optional=True,
        gauge=Gauge(
            series="foreshock_update_ratio",
            help="Norm of an optimizer step's update over the norm of the weights, at the newest measured step, "
            "estimated from a sample of the weights.",
        ),
    ),
    Column(
        name="first_moment_norm",
        optional=True,
        gauge=Gauge(
            series="foreshock_first_moment_norm",
            help="L2 norm of the optimizer's first moment (Adam's `exp_avg`, SGD's `momentum_buffer`) before the "
            "newest measured step, estimated from a sample of its elements.",
        ),
    ),
    Column(
        name="second_moment_norm",
        optional=True,
        gauge=Gauge(
            series="foreshock_second_moment_norm",
            help="Square root of the sum of the optimizer's second moment (Adam's `exp_avg_sq`, RMSprop's "
            "`square_avg`) before the newest measured step, estimated from a sample of its elements: the gradient "
            "norm that the optimizer scales its updates by.",
        ),
    ),
    Column(name="reduced_sequence", part=Part.REDUCED, integer=True),
    Column(name="reduced_square_sum", part=Part.REDUCED),
    Column(name="reduced_nan_ranks", part=Part.REDUCED),
    Column(name="reduced_inf_ranks", part=Part.REDUCED),
    Column(name="reduced_idle_ranks", part=Part.REDUCED),
    Column(name="reduced_loss_sum", part=Part.REDUCED),
    Column(name="reduced_loss_count", part=Part.REDUCED),
    Column(name="reduced_nan_losses", part=Part.REDUCED),
    Column(name="reduced_inf_losses", part=Part.REDUCED),
)
"""Every column; `StepBatch` says what each of them means."""

MEASURED_COLUMNS = tuple(column for column in COLUMNS if column.part in (Part.MEASURED, Part.REDUCED))
"""Columns of the ring's measured part, in their order there. Those of the all-reduce come last."""
REDUCED_COLUMNS = tuple(column for column in COLUMNS if column.part is Part.REDUCED)
WIRE_COLUMNS = tuple(column for column in COLUMNS if column.on_wire)
"""Columns that `StepBatch` has a field for."""
RECORD_COLUMNS = tuple(column for column in WIRE_COLUMNS if column.part is not Part.REDUCED)
"""Columns of a record in a `StepBlock`, in their order there: a new one is optional, and comes last."""
MEASURED_NAMES = tuple(column.name for column in MEASURED_COLUMNS)
REDUCED_NAMES = tuple(column.name for column in REDUCED_COLUMNS)
WIRE_NAMES = tuple(column.name for column in WIRE_COLUMNS)
NONFINITE_VALUES = tuple(column.name for column in COLUMNS if column.nonfinite is Nonfinite.VALUE)
NONFINITE_COUNTS = tuple(column.name for column in COLUMNS if column.nonfinite is Nonfinite.COUNT)
"""A record is non-finite if one of `NONFINITE_VALUES` is, or one of `NONFINITE_COUNTS` is above zero."""

WEIGHT_BLOCKS = (
    *("parameter_layer_norms", "update_layer_ratios"),
    *("first_moment_layer_norms", "second_moment_layer_norms"),
)
"""Blocks with a value for each layer, of the steps that measure the weights: each is by layer what the column of the
similar name is in total. In the ring and on the wire they follow each other in this order."""
