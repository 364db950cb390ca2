"""Measures the weights on the device, without a sync: how large they are, how fast they move, what the optimizer's
moments hold, and whether ranks agree.

Norms are estimated from a sample of the elements. To read all of the weights and of Adam's moments, 12 bytes per
float32 element, would cost two fifths of what the optimizer's step itself reads and writes, 28 bytes. The fingerprint
needs every bit, so it is taken every 100 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Norms, Number, WeightSummary
from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._measure.samples import TensorSampler

EVERY_STEPS = 100
"""The fingerprint, and the largest element of the gradient, are measured on the first step and on every hundredth
after it, the same on all ranks."""
NORMS_EVERY_STEPS, NORMS_EVERY_STEPS_IF_SMALL = 10, 25
"""Norms are measured on the first two steps and on every tenth after the first, the same on all ranks. Small models
take fewer looks: one takes about a millisecond whatever the size, and would cost more than 1 % of their steps."""
_SMALL = 5_000_000
"""Elements below which a model is small: its step takes about 20 ms at most on two CPU cores."""
_MODULUS = 2**52
"""Fingerprints travel as float64, which holds whole numbers below 2^53."""
_MOMENTS = {
    "first_moment_norm": ("exp_avg", "momentum_buffer"),
    "second_moment_norm": ("exp_avg_sq", "square_avg"),
}
"""What the optimizers of torch.optim call the moments, in their state of a parameter."""
_COLUMNS = ("parameter_norm", "update_ratio", "first_moment_norm", "second_moment_norm")
"""Columns in total for WEIGHT_BLOCKS, in their order."""


def due(sequence: int) -> bool:
    """Return whether the fingerprint and the largest element are measured. sequence: number of the step, from 1."""
    return (sequence - 1) % EVERY_STEPS == 0


class Weights:
    """Measures the weights of one rank, and the moments that its optimizer keeps of them."""

    def __init__(self, plan: ParameterPlan, optimizer: torch.optim.Optimizer, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self._parameters = plan.parameters
        self._optimizer = optimizer
        self._device = plan.device()
        self._layer_of = torch.tensor(plan.layer_of, dtype=torch.int64, device=self._device)
        self._layers = len(plan.layers)
        self._nothing = arithmetic.zeros(self._layers)
        self._all, self._parameters_only = TensorSampler(plan.parameters), TensorSampler(plan.parameters)
        elements = sum(parameter.numel() for parameter in plan.parameters)
        self.every = NORMS_EVERY_STEPS if elements >= _SMALL else NORMS_EVERY_STEPS_IF_SMALL
        """Steps between two measurements of norms; it divides `EVERY_STEPS`."""
        self._before: Tensor | None = None
        """Samples of the weights before the last step, where its update is to be measured."""

    def measure_due(self, sequence: int) -> WeightSummary | None:
        """Measure what is due before a step; None if nothing is. sequence: number of its record, from 1."""
        if self._before is None and sequence % self.every > 1:
            return None
        before, self._before = self._before, None
        columns: dict[str, Number] = {}
        layers: Norms | None = None
        if due(sequence):
            columns["parameter_fingerprint"] = self._arithmetic.number(
                fingerprint([p.detach() for p in self._parameters])
            )
        # One optimizer step lies in between, even if records of skipped steps do as well.
        if before is not None or (sequence - 1) % self.every == 0:
            norms = self._measure(before)
            columns |= {name: norms[name][0] for name in norms}
            layers = self._by_layer(norms)
        # A young run should not have to wait for its first update.
        if sequence == 1 or sequence % self.every == 0:
            (self._before,) = self._parameters_only.read(self._parameters)
        return WeightSummary(columns=columns, layers=layers) if columns else None

    def _measure(self, before: Tensor | None) -> dict[str, Norms]:
        """Return each column that can be measured, in total and then by layer: [1 + layers]."""
        groups: dict[str, Sequence[Tensor | None]] = {"parameter_norm": self._parameters}
        groups |= {column: moments for column, names in _MOMENTS.items() if (moments := self._moments(names))}
        samples = self._all.read(*groups.values())
        names = [*groups]
        if "second_moment_norm" in groups:
            samples[names.index("second_moment_norm")].sqrt_()
        if before is not None:
            samples = torch.cat((samples, (samples[0] - before).unsqueeze(0)))
            names.append("update_ratio")
        norms = self._norms(self._all.squares(samples))
        if before is not None:
            norms[-1] = torch.where(norms[0] > 0, norms[-1] / norms[0], 0.0)
        return dict(zip(names, self._arithmetic.rows(norms), strict=True))

    def _by_layer(self, norms: Mapping[str, Norms]) -> Norms:
        return self._arithmetic.joined([norms[name][1:] if name in norms else self._nothing for name in _COLUMNS])

    def _norms(self, squares: Tensor) -> Tensor:
        """Return the norm of all tensors, then that of each layer: [groups, 1 + layers]. squares: [groups, tensors]."""
        by_layer = squares.new_zeros(len(squares), self._layers).index_add_(1, self._layer_of, squares)
        return torch.cat((by_layer.sum(1, keepdim=True), by_layer), 1).sqrt_()

    def _moments(self, names: Sequence[str]) -> list[Tensor | None]:
        """Return the optimizer's moments of each parameter; None for one that has never had a gradient.

        Empty where there are none yet, or where this rank has only its share of them.
        """
        found: list[Tensor | None] = []
        states = self._optimizer.state
        for parameter in self._parameters:
            state = states.get(parameter) or {}
            moment = state.get(names[0], state.get(names[1]))
            if moment is not None:
                if moment.numel() != parameter.numel() or moment.device != self._device:
                    return []
                found.append(moment)
            elif parameter.grad is not None:
                return []
            else:
                found.append(None)
        return found if any(moment is not None for moment in found) else []


def fingerprint(parameters: Sequence[Tensor]) -> Tensor:
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
