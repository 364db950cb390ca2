"""Puts the columns of a step's record together on the device: the measured part, as the ring lays it out."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock._local import SUM_FIELDS, RankSums
from foreshock._norms import NormSummary
from foreshock._weights import WeightFacts
from foreshock_recorder.ring import DEVICE_COLUMNS

_OWN = DEVICE_COLUMNS[: -1 - len(SUM_FIELDS)]
assert DEVICE_COLUMNS[len(_OWN) :] == ("reduced_sequence", *SUM_FIELDS)


class Row:
    """Of one rank; preallocated, written anew each step."""

    def __init__(self, columns: int, layers: int, device: torch.device) -> None:
        self.constants = {
            value: torch.full((), value, dtype=torch.float64, device=device) for value in (-1.0, 0.0, 1.0)
        }
        self._no_sums = torch.zeros(1 + len(SUM_FIELDS), dtype=torch.float64, device=device)
        self._no_layers = torch.zeros(layers, dtype=torch.float64, device=device)
        self._row = torch.zeros(columns, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._row.device

    def filled(
        self,
        summary: NormSummary,
        *,
        scale: Tensor | None,
        coefficient: Tensor,
        found_inf: Tensor | None,
        shadow: Tensor,
        local: NormSummary | None,
        sums: RankSums | None,
        weights: WeightFacts,
    ) -> Tensor:
        """The row: float64, [columns]. summary: of the averaged gradient, unscaled.

        scale: of the loss, float64 scalar; the local gradients were seen with it. sums: over the ranks.
        """
        zero, one, none = (self.constants[value] for value in (0.0, 1.0, -1.0))
        values = {
            "loss_scale": one if scale is None else scale.reshape(()),
            "global_norm": summary.total,
            "clip_coefficient": coefficient,
            "global_nan_parameters": summary.nan_parameters,
            "global_inf_parameters": summary.inf_parameters,
            "first_nonfinite_global": summary.first_nonfinite,
            "first_nonfinite_local": none,
            "skipped": zero if found_inf is None else found_inf.double().reshape(()),
            "shadow": shadow,
            "parameter_fingerprint": none if weights.fingerprint is None else weights.fingerprint,
            "parameter_norm": zero if weights.norm is None else weights.norm,
            "gradient_absolute_maximum": zero if summary.largest is None else summary.largest,
            "update_ratio": zero if weights.update_ratio is None else weights.update_ratio,
        }
        if local is not None:
            if scale is not None:
                local = local.unscaled(scale)
            values["local_norm"] = local.total
            values["local_nan_parameters"] = local.nan_parameters
            values["local_inf_parameters"] = local.inf_parameters
            values["first_nonfinite_local"] = local.first_nonfinite
        reduced = self._no_sums
        if sums is not None:
            sums.scaled_by(scale)
            reduced = sums.collect()
        scalars = torch.stack([values.get(name, zero) for name in _OWN])
        local_layers = self._no_layers if local is None else local.layers
        return torch.cat((scalars, reduced, summary.layers, local_layers), out=self._row)
