"""Scenario of test_ignite.py: an engine of Ignite that accumulates, alone and watched. Each rank runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import create_supervised_trainer
from torch import Tensor, nn

import foreshock
from tests.agent.scenarios.training import WIDTH, batches, column, main, make_model, make_optimizer, same, told, weights

STEPS, PARTS = 6, 2


def trained(*, watched: bool) -> tuple[list[Tensor], list[float], dict[str, Any]]:
    """Weights, norms before each step, and what was found."""
    model, norms = make_model(), list[float]()
    optimizer = make_optimizer(model)

    def before_step(*_: object) -> None:
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))

    optimizer.register_step_pre_hook(before_step)
    watch = foreshock.attach(model, optimizer) if watched else foreshock.Watch()
    engine = create_supervised_trainer(model, optimizer, nn.MSELoss(), gradient_accumulation_steps=PARTS)
    generator = batches()
    inputs = [torch.randn(8, WIDTH, generator=generator) for _ in range(STEPS * PARTS)]
    engine.run([(x, x.sum(1, keepdim=True)) for x in inputs], max_epochs=1)
    found = told(watch) if watched else {}
    watch.detach()
    return weights(model), norms, found


def beside_alone() -> dict[str, Any]:
    alone, _, _ = trained(watched=False)
    ours, norms, found = trained(watched=True)
    return {
        "same": same(alone, ours),
        "norms": norms,
        "global": column(found, "global_norm"),
        "edited": [record["edited"] for record in found["records"]],
        "dropped": found["dropped"],
    }


SCENARIOS: dict[str, Callable[[], Any]] = {"observed": beside_alone}

if __name__ == "__main__":
    main(SCENARIOS)
