"""What a step is, as detection and diagnosis see it: plain values, one per step and one per rank and step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from foreshock_protos.v1 import telemetry_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One rank's record of one step."""

    rank: int
    sequence: int
    step: int
    wall_seconds: float
    monotonic_seconds: float
    learning_rate: float
    complete: bool
    skipped: bool
    loss: float | None
    loss_scale: float
    global_norm: float
    clip_coefficient: float
    local_norm: float
    global_nan: float
    global_inf: float
    local_nan: float
    local_inf: float
    first_nonfinite_global: int
    first_nonfinite_local: int
    reduced: tuple[float, ...]
    """Sequence number, then the sums over ranks, as in `StepBatch.reduced_*`."""
    layer_norms: tuple[float, ...]
    """Of the averaged gradient; rank 0 only."""

    @property
    def bad_locally(self) -> bool:
        """Not finite before the all-reduce could have brought it from another rank."""
        bad_loss = self.loss is not None and not math.isfinite(self.loss)
        return bad_loss or self.local_nan > 0 or self.local_inf > 0

    @property
    def bad(self) -> bool:
        """Anything not finite."""
        return self.bad_locally or self.global_nan > 0 or self.global_inf > 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of the run: its ranks put together."""

    attempt: int
    step: int
    wall_seconds: float
    duration_seconds: float | None
    learning_rate: float
    loss: float | None
    loss_scale: float
    global_norm: float
    clip_coefficient: float
    skipped: bool
    nan_gradient: bool
    inf_gradient: bool
    layer_norms: tuple[float, ...]
    ranks: dict[int, RankRow] = field(repr=False)

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """(source, kind) of what is not finite."""
        found = []
        if self.loss is not None and not math.isfinite(self.loss):
            found.append(("loss", "nan" if math.isnan(self.loss) else "inf"))
        found += [("gradient", "nan")] if self.nan_gradient else []
        found += [("gradient", "inf")] if self.inf_gradient else []
        return found


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model summary, as far as diagnosis needs it."""

    type: str = ""
    module_types: dict[str, int] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    parameter_layers: tuple[int, ...] = ()

    @classmethod
    def from_hello(cls, hello: pb.Hello) -> ModelFacts:
        """Decode."""
        model = hello.model
        return cls(
            type=model.type,
            module_types=dict(model.module_types),
            parameters=tuple(model.parameters),
            layers=tuple(model.layers),
            parameter_layers=tuple(model.parameter_layers),
        )

    def parameter(self, index: int) -> tuple[str, str]:
        """Name of a parameter and of its layer."""
        if index >= len(self.parameters):
            return "", ""
        return self.parameters[index], self.layers[self.parameter_layers[index]]


def put_together(attempt: int, rows: dict[int, RankRow], *, expected: int, previous: RankRow | None) -> Step:
    """One step from its ranks' rows. Ranks hold the same averaged gradient: any finite view of it will do.

    The loss is the mean over ranks; where ranks are missing, the sum that travelled with the gradients knows better.
    """
    first = rows[min(rows)]
    losses = [row.loss for row in rows.values() if row.loss is not None]
    loss = sum(losses) / len(losses) if losses else None
    if len(rows) < expected and loss is not None and math.isfinite(loss):
        for row in rows.values():
            sequence, _, _, _, _, total, count, nans, infs = row.reduced
            if sequence == row.sequence and count == expected and not nans and not infs:
                loss = total / count
    duration = first.monotonic_seconds - previous.monotonic_seconds if previous is not None else None
    return Step(
        attempt=attempt,
        step=first.step,
        wall_seconds=first.wall_seconds,
        duration_seconds=duration if duration is not None and duration > 0 else None,
        learning_rate=first.learning_rate,
        loss=loss,
        loss_scale=first.loss_scale,
        global_norm=first.global_norm,
        clip_coefficient=first.clip_coefficient,
        skipped=first.skipped,
        nan_gradient=any(row.global_nan > 0 or row.local_nan > 0 for row in rows.values()),
        inf_gradient=any(row.global_inf > 0 or row.local_inf > 0 for row in rows.values()),
        layer_norms=first.layer_norms,
        ranks=rows,
    )


def rows_of(batch: pb.StepBatch, rank: int, layers: int) -> list[RankRow]:
    """Decode a batch. Raises `ValueError` where its columns contradict each other."""
    count = len(batch.step)
    columns: dict[str, Any] = {name: list(getattr(batch, name)) for name in _COLUMNS}
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(f"column {name} has {len(values)} rows, step has {count}")
    norms = list(batch.global_layer_norms)
    if len(norms) not in (0, count * layers) or len(batch.local_layer_norms) not in (0, count * layers):
        raise ValueError(f"layer norms are not {count} rows of {layers} layers")
    rows = []
    for i in range(count):
        value = {name: values[i] for name, values in columns.items()}
        flags = value["flags"]
        rows.append(
            RankRow(
                rank=rank,
                sequence=batch.first_sequence + i,
                step=batch.step[i],
                wall_seconds=value["wall_seconds"],
                monotonic_seconds=value["monotonic_seconds"],
                learning_rate=value["learning_rate"],
                complete=not flags & pb.INCOMPLETE,
                skipped=bool(flags & pb.SKIPPED),
                loss=value["loss"] if flags & pb.LOSS_OBSERVED else None,
                loss_scale=value["loss_scale"],
                global_norm=value["global_norm"],
                clip_coefficient=value["clip_coefficient"],
                local_norm=value["local_norm"],
                global_nan=value["global_nan_parameters"],
                global_inf=value["global_inf_parameters"],
                local_nan=value["local_nan_parameters"],
                local_inf=value["local_inf_parameters"],
                first_nonfinite_global=int(value["first_nonfinite_global"]),
                first_nonfinite_local=int(value["first_nonfinite_local"]),
                reduced=tuple(value[name] for name in _COLUMNS if name.startswith("reduced_")),
                layer_norms=tuple(norms[i * layers : (i + 1) * layers]),
            )
        )
    return rows


_COLUMNS = tuple(
    field.name
    for field in pb.StepBatch.DESCRIPTOR.fields
    if field.name not in ("instance", "first_sequence", "step", "global_layer_norms", "local_layer_norms", "dropped")
)
