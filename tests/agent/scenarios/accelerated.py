"""Scenarios of test_accelerate.py: a loop with Accelerate's model and optimizer as they are. Each rank runs it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import foreshock
from tests.agent.scenarios.training import WIDTH, apart, batches, column, loss_of, main, same, told, weights

STEPS, PARTS = 6, 2


def trained(max_norm: float, *, watched: bool, clip: float | None = None) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights, and what was found. max_norm: by which the script clips."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    layers = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 1))
    model, optimizer = accelerator.prepare(layers, torch.optim.AdamW(layers.parameters(), lr=0.01))
    watch = foreshock.attach(model, optimizer, clip=clip) if watched else foreshock.Watch()
    data, norms = batches(), []
    for _ in range(STEPS * PARTS):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, data))
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
            optimizer.step()
            optimizer.zero_grad()
    found = {"norms": norms, **(told(watch) if watched else {})}
    watch.detach()
    return weights(model), found


def beside_alone(max_norm: float, clip: float | None) -> dict[str, Any]:
    alone, _ = trained(max_norm if clip is None else clip, watched=False)
    ours, found = trained(max_norm, watched=True, clip=clip)
    return {
        "same": same(alone, ours),
        "apart": apart(alone, ours),
        "norms": found["norms"],
        "global": column(found, "global_norm"),
        "edited": [record["edited"] for record in found["records"]],
        "dropped": found["dropped"],
    }


SCENARIOS: dict[str, Callable[[], Any]] = {
    "clips": functools.partial(beside_alone, 0.5, None),
    "logs_norms": functools.partial(beside_alone, math.inf, 0.5),
}

if __name__ == "__main__":
    main(SCENARIOS)
