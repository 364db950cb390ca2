"""Scenarios of test_logged_norms.py: scripts that call `clip_grad_norm_` for what it returns. Each rank runs it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import foreshock
from tests.agent.scenarios.training import (
    STEPS,
    apart,
    batches,
    column,
    loss_of,
    main,
    make_model,
    make_optimizer,
    told,
    weights,
)


def norm_of(model: nn.Module) -> float:
    return float(
        torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    )


def beside_stock(max_norm: Callable[[int], float | None], *, fused: bool, scale: float | None = None) -> dict[str, Any]:
    """The script, beside one that clips where Foreshock is to clip."""
    norms: list[float] = []

    def run(*, watched: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model = make_model()
        optimizer = make_optimizer(model, fused=fused)
        watch = foreshock.attach(model, optimizer, clip=0.3) if watched else foreshock.Watch()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        data = batches()
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            limit = max_norm(step)
            if watched:
                norms.append(norm_of(model))
            if limit is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            if not watched and limit != 0.5:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
        found = told(watch) if watched else {}
        watch.detach()
        return weights(model), found

    stock, _ = run(watched=False)
    ours, found = run(watched=True)
    return {
        "apart": apart(stock, ours),
        "norms": norms,
        "edited": [record["edited"] for record in found["records"]],
        "global": column(found, "global_norm"),
        "coefficient": column(found, "clip_coefficient"),
        "dropped": found["dropped"],
    }


SCENARIOS: dict[str, Callable[[], Any]] = {
    "fused": functools.partial(beside_stock, lambda _: math.inf, fused=True),
    "unfused": functools.partial(beside_stock, lambda _: math.inf, fused=False),
    # Its scale is no power of two.
    "scaled": functools.partial(beside_stock, lambda _: math.inf, fused=True, scale=1000.0),
    "every_third": functools.partial(beside_stock, lambda step: math.inf if step % 3 == 2 else None, fused=True),
    "clips_late": functools.partial(beside_stock, lambda step: 0.5 if step == 3 else math.inf, fused=True),
}

if __name__ == "__main__":
    main(SCENARIOS)
