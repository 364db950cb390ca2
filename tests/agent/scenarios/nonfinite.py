"""Scenarios of test_nonfinite.py: gradients that hold NaN or Inf on one rank or two. Each rank runs it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import foreshock
from tests.agent.scenarios.training import (
    column,
    main,
    make_model,
    make_optimizer,
    told,
    train,
    wait_for_sums,
)


def poisoned(values: dict[int, dict[int, float]], *, at: int, one_bucket: bool = False) -> dict[str, Any]:
    """values: of rank, of parameter: what one element of its local gradient becomes at a step."""
    model = make_model()
    if one_bucket:
        model = DistributedDataParallel(model.module)
    optimizer = make_optimizer(model, "SGD")
    now = 0
    parameters = list(model.parameters())
    for index, value in values.get(dist.get_rank(), {}).items():

        def poison(gradient: Tensor, value: float = value) -> Tensor:
            gradient = gradient.clone()
            if now == at:
                gradient.view(-1)[-1] = value
            return gradient

        parameters[index].register_hook(poison)  # type: ignore[no-untyped-call]

    def count(step: int, _: Tensor) -> None:
        nonlocal now
        now = step

    with foreshock.attach(model, optimizer, clip=1.0) as watch:
        train(model, optimizer, steps=at + 2, before_backward=count, before_step=lambda: wait_for_sums(watch))
        found = told(watch)
    names = (
        "global_nan_parameters", "global_inf_parameters", "local_nan_parameters", "local_inf_parameters",
        "first_nonfinite_global", "first_nonfinite_local", "clip_coefficient",
        "reduced_sequence", "reduced_nan_ranks", "reduced_inf_ranks", "reduced_idle_ranks",
    )  # fmt: skip
    return {
        "global": [str(norm) for norm in column(found, "global_norm")],
        "local": [str(norm) for norm in column(found, "local_norm")],
        **{name: column(found, name) for name in names},
    }


def nan_on_rank_1() -> dict[str, Any]:
    return poisoned({1: {2: math.nan, 4: math.nan}}, at=2)


def nan_at_the_first_step() -> dict[str, Any]:
    return poisoned({1: {1: math.nan, 2: math.nan, 4: math.nan}}, at=0, one_bucket=True)


def inf_on_rank_0() -> dict[str, Any]:
    return poisoned({0: {0: math.inf, 3: -math.inf}}, at=2)


def nan_and_inf() -> dict[str, Any]:
    return poisoned({0: {1: math.inf}, 1: {3: math.nan}}, at=2)


def inf_of_both_signs() -> dict[str, Any]:
    return poisoned({0: {5: math.inf}, 1: {5: -math.inf}}, at=2)


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
