"""Puts the columns of a step's record together: its measured part, as the ring lays it out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreshock._local import RankSums
from foreshock._norms import Norms, NormSummary
from foreshock._numbers import Number, constant, on_host, vector
from foreshock._weights import WeightSummary
from foreshock_protos.columns import MEASURED_COLUMNS, REDUCED_COLUMNS, Part

_OWN = tuple(column for column in MEASURED_COLUMNS if column.part is not Part.REDUCED)
assert MEASURED_COLUMNS == _OWN + REDUCED_COLUMNS


class Row:
    """Of one rank."""

    def __init__(self, columns: int, layers: int, device: torch.device) -> None:
        self._device = device
        constants = {value: constant(value, device) for value in {column.missing for column in MEASURED_COLUMNS}}
        self._missing = [(column.name, constants[column.missing]) for column in _OWN]
        self._no_sums = [constants[column.missing] for column in REDUCED_COLUMNS]
        no_layers = torch.zeros(layers, dtype=torch.float64, device=device)
        self._no_layers: Norms = no_layers.tolist() if on_host(device) else no_layers
        zero, none = constant(0.0, device), constant(-1.0, device)
        self.nothing = NormSummary(
            total=zero, nan_parameters=zero, inf_parameters=zero, first_nonfinite=none, layers=self._no_layers
        )
        """Of a gradient that was not measured."""
        self._row = torch.zeros(columns, dtype=torch.float64, device=device)
        """Preallocated, and written anew each step."""

    def filled(
        self,
        summary: NormSummary,
        *,
        scale: Number | None,
        coefficient: Number | None,
        found_inf: Number | None,
        shadow: Number | None,
        local: NormSummary | None,
        sums: RankSums | None,
        weights: WeightSummary | None,
    ) -> Norms:
        """The row, [columns]. summary: of the averaged gradient; local: of this rank's own; both unscaled.

        scale: of the loss. sums: over the ranks, which were seen with it. None: nothing to tell of.
        """
        values: dict[str, Number | None] = {
            **({} if weights is None else weights.columns),
            "loss_scale": scale,
            "global_norm": summary.total,
            "clip_coefficient": coefficient,
            "global_nan_parameters": summary.nan_parameters,
            "global_inf_parameters": summary.inf_parameters,
            "first_nonfinite_global": summary.first_nonfinite,
            "gradient_absolute_maximum": summary.largest,
            "skipped": found_inf,
            "shadow": shadow,
        }
        if local is not None:
            values["local_norm"] = local.total
            values["local_nan_parameters"] = local.nan_parameters
            values["local_inf_parameters"] = local.inf_parameters
            values["first_nonfinite_local"] = local.first_nonfinite
        reduced: Sequence[Number] = self._no_sums
        if sums is not None:
            sums.scaled_by(scale)
            reduced = sums.collect()
        own = [missing if (value := values.get(name)) is None else value for name, missing in self._missing]
        return self._joined([*own, *reduced], summary.layers, self._no_layers if local is None else local.layers)

    def _joined(self, scalars: Sequence[Number], layers: Norms, local_layers: Norms) -> Norms:
        if isinstance(layers, Tensor) and isinstance(local_layers, Tensor):
            return torch.cat((vector(scalars, self._device), layers, local_layers), out=self._row)
        return [float(value) for part in (scalars, layers, local_layers) for value in part]
