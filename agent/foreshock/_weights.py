"""Measures of the weights, sampled every 100 steps: whether ranks agree, how large they are, how fast they move.

On the device and without a sync. One kernel per parameter, so not every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foreshock._norms import gradient_norms, overall
from foreshock._numbers import Number, number

EVERY_STEPS = 100
"""Weights, and the largest element of the gradient, are looked at on the first step and on every hundredth after it,
the same on all ranks."""
_MODULUS = 2**52
"""Fingerprints travel as float64, which holds whole numbers below 2^53."""
_SAMPLES = 4096
"""Elements of a parameter, evenly spread, by which its movement is measured: a copy of all would cost memory."""


def due(sequence: int) -> bool:
    """A step on which a closer look is taken. sequence: its number, from 1."""
    return (sequence - 1) % EVERY_STEPS == 0


class Weights:
    """Those of one rank. parameters: in the model's order, so in the same order on every rank."""

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._before: list[Tensor] | None = None

    def look(self, sequence: int) -> dict[str, Number]:
        """Columns of the record of the step that comes next, by name, as far as they are due. sequence: from 1."""
        columns: dict[str, Number] = {}
        if self._before is not None:
            columns["update_ratio"] = self._movement(self._before)
            self._before = None
        if due(sequence):
            self._before = self._samples()
            columns["parameter_fingerprint"] = number(fingerprint(self._parameters))
            columns["parameter_norm"] = overall(gradient_norms(self._parameters, self._parameters[0].device))
        return columns

    def _samples(self) -> list[Tensor]:
        flat = (p.reshape(-1) for p in self._parameters)
        return [p[:: -(-p.numel() // _SAMPLES)].to(torch.float64, copy=True) if p.numel() else p for p in flat]

    def _movement(self, before: list[Tensor]) -> Number:
        after = self._samples()
        moved = torch.stack([(a - b).square().sum() for a, b in zip(after, before, strict=True)]).sum()
        size = torch.stack([b.square().sum() for b in before]).sum()
        return number(torch.where(size > 0, (moved / size.clamp_min(1e-300)).sqrt(), 0.0))


def fingerprint(parameters: list[Tensor]) -> Tensor:
    """Exact, and free of the order of addition: a sum of the bit patterns as whole numbers, each parameter by a weight
    of its own, so that two that have changed places show. Float64 scalar.
    """
    sums = torch.stack([_bits(p).sum(dtype=torch.int64) for p in parameters])
    odd = 2 * torch.arange(len(parameters), dtype=torch.int64, device=sums.device) + 1
    # int64 wraps around, which is arithmetic modulo 2^64; the mask makes it modulo 2^52.
    return ((sums * odd).sum() & (_MODULUS - 1)).to(torch.float64)


def _bits(parameter: Tensor) -> Tensor:
    # Pieces of at most 32 bits: a flip of any of them is less than the modulus.
    width = {1: torch.int8, 2: torch.int16}.get(parameter.element_size(), torch.int32)
    return parameter.contiguous().reshape(-1).view(width)
