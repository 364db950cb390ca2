"""Plans of a few parameters for the tests of Triton's kernels, and where these run."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreshock._arithmetic.parameters import ParameterPlan

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
"""Triton's interpreter runs kernels on CPU tensors; with TRITON_INTERPRET=0 they are compiled for a card."""


def plan_of(*sizes: int, layers: int = 2, dtypes: Sequence[torch.dtype] = ()) -> ParameterPlan:
    """Parameters of these sizes, dealt out to some layers in turn. dtypes: of each, float32 by default."""
    kinds = dtypes or [torch.float32] * len(sizes)
    tensors = [torch.zeros(size, dtype=dtype, device=DEVICE) for size, dtype in zip(sizes, kinds, strict=True)]
    parameters = tuple(nn.Parameter(tensor) for tensor in tensors)
    return ParameterPlan(
        parameters=parameters,
        names=tuple(f"p{index}" for index in range(len(sizes))),
        layers=tuple(f"layer{layer}" for layer in range(layers)),
        layer_of=tuple(index % layers for index in range(len(sizes))),
        index={parameter: index for index, parameter in enumerate(parameters)},
        # Not their positions: some have joined the optimizer later.
        numbers=tuple(10 + index for index in range(len(sizes))),
    )


def on_device(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.to(DEVICE) for gradient in gradients]
