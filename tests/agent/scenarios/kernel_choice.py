"""Scenarios of test_kernels_on_ranks.py: ranks whose kernels do not run, on one rank or all. Each rank runs it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

import foreshock
from foreshock._attach import attach
from foreshock._kernels.stages import KernelMeasure
from tests.agent.scenarios.training import (
    active,
    alike,
    apart,
    column,
    main,
    make_model,
    make_optimizer,
    told,
    train,
    use,
)

CLIP = 0.5


def watched(name: str, *, clip: Any = CLIP, local_norms: bool = True, **ddp: Any) -> dict[str, Any]:
    """A watched training beside one with stock clipping."""
    model = make_model(**ddp)
    optimizer = make_optimizer(model, fused=True)

    def clip_stock() -> None:
        if isinstance(clip, foreshock.ValueClip):
            nn.utils.clip_grad_value_(model.parameters(), clip.clip_value)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), clip)

    stock = train(model, optimizer, before_step=clip_stock)
    ours = make_model(**ddp)
    optimizer = make_optimizer(ours, fused=True)
    with foreshock.attach(ours, optimizer, clip=clip, run=name, local_norms=local_norms) as watch:
        weights = train(ours, optimizer, before_backward=lambda step, loss: watch.observe(loss=loss, step=step))
        found = told(watch)
        kernels = isinstance(active(watch)._measure, KernelMeasure)
    return {
        "kernels": kernels,
        "apart": apart(stock, weights),
        "alike": alike(weights),
        "dropped": found["dropped"],
        "losses": [record["loss"] is not None for record in found["records"]],
        "local": column(found, "local_norm"),
        "global": column(found, "global_norm"),
    }


def with_kernels() -> dict[str, Any]:
    use("interpreter")
    return watched("with_kernels")


def one_rank_without() -> dict[str, Any]:
    use("kernels")
    known = vars(attach)["step_kernel"]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find\nC compiler")

    if dist.get_rank() == 1:
        vars(attach)["step_kernel"] = fails
    try:
        return watched("one_rank_without")
    finally:
        vars(attach)["step_kernel"] = known


def value_clip() -> dict[str, Any]:
    use("kernels")
    return watched("value_clip", clip=foreshock.ValueClip(clip_value=0.05))


def bucket_views() -> dict[str, Any]:
    use("kernels")
    return watched("bucket_views", gradient_as_bucket_view=True)


def bucket_views_without_local_norms() -> dict[str, Any]:
    use("kernels")
    return watched("bucket_views_without_local_norms", gradient_as_bucket_view=True, local_norms=False)


def on_a_cpu() -> dict[str, Any]:
    use("host")
    return watched("on_a_cpu")


if __name__ == "__main__":
    scenarios = (with_kernels, one_rank_without, value_clip, bucket_views, bucket_views_without_local_norms, on_a_cpu)
    main({scenario.__name__: scenario for scenario in scenarios})
