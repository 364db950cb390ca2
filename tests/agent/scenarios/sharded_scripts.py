"""Scenarios of test_sharded.py: bad batches, scripts' own clipping, ranks that detach, refusals. Each rank runs it."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import foreshock
from foreshock._attach import models
from tests.agent.scenarios.sharded import (
    MAX_NORM,
    Observe,
    backward,
    beside_stock,
    clipped,
    fused,
    layers,
    make_model,
    measured,
    mesh_of,
    whole,
)
from tests.agent.scenarios.training import active, apart, batches, column, error_of, loss_of, main, told


def nan_in_a_batch(*, skip: bool) -> dict[str, Any]:
    """Rank 1's data make a gradient NaN, from the layer in the middle on, at step 3."""
    model = make_model()
    optimizer, data = fused(model), batches()
    now = 0

    def poison(gradient: Tensor) -> Tensor:
        return gradient * math.nan if now == 3 and dist.get_rank() == 1 else gradient

    handle = model[1].register_forward_hook(lambda _, __, output: output.register_hook(poison) and None)
    with foreshock.attach(model, optimizer, clip=MAX_NORM, skip=skip) as watch:
        for now in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, data)
            watch.observe(loss=loss, step=now)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = told(watch)
        names = list(active(watch)._measure.plan.names)
    handle.remove()
    return {
        "norms": [str(norm) for norm in column(found, "global_norm")],
        "nan": column(found, "global_nan_parameters"),
        "first": [names[int(n)] if n >= 0 else "" for n in column(found, "first_nonfinite_global")],
        "local": column(found, "first_nonfinite_local"),
        "ranks": column(found, "reduced_nan_ranks"),
        "finite": all(bool(w.isfinite().all()) for w in whole(model)),
        "skipped": column(found, "skipped"),
        "dropped": found["dropped"],
    }


def nan_batch() -> dict[str, Any]:
    return nan_in_a_batch(skip=False)


def nan_batch_skipped() -> dict[str, Any]:
    return nan_in_a_batch(skip=True)


def one_rank_detaches() -> dict[str, Any]:
    """Its shards still belong to the others' norms."""
    model = make_model()
    optimizer, data, norms = fused(model), batches(), []
    with foreshock.attach(model, optimizer) as watch:
        for step in range(6):
            if step == 3 and dist.get_rank() == 1:
                watch.detach()
            optimizer.zero_grad()
            backward(model, data)
            norms.append(measured(model))
            optimizer.step()
        found = told(watch)
    return {"norms": norms, "ours": column(found, "global_norm"), "dropped": found["dropped"]}


def own_clipping() -> dict[str, Any]:
    """The script clips by itself, as loosely as stock clipping here; Foreshock would clip more."""

    def between(model: nn.Module, data: torch.Generator, _: Observe) -> None:
        backward(model, data)
        before.append(measured(model))
        clipped(model)

    before: list[float] = []
    result = beside_stock(make_model, fused, clip=MAX_NORM / 2, steps=6, train=between)
    return {**result, "norms": before[6:]}


def own_clipping_scaled() -> dict[str, Any]:
    """After the script has unscaled."""
    model = make_model()
    optimizer, data, norms = fused(model), batches(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with foreshock.attach(model, optimizer, clip=MAX_NORM / 2) as watch:
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norms.append(clipped(model))
            scaler.step(optimizer)
            scaler.update()
        found = told(watch)
    return {
        "ours": column(found, "global_norm"),
        "norms": norms,
        "coefficients": column(found, "clip_coefficient"),
        "edited": [record["edited"] for record in found["records"]],
    }


def let_go() -> int:
    """How much of a training is left that nobody keeps: model, optimizer, parameters and watch."""

    def train() -> list[Any]:
        model = make_model()
        optimizer = fused(model)
        watch = foreshock.attach(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, batches())
            optimizer.step()
        return [*map(weakref.ref, (model, optimizer, watch, *model.parameters()))]

    references = train()
    gc.collect()
    return sum(reference() is not None for reference in references)


def attached_before_a_step() -> dict[str, Any]:
    """After a backward pass: its gradient is clipped as well."""
    results = []
    for stock in (True, False):
        model = make_model()
        optimizer = fused(model)
        backward(model, batches())
        if stock:
            clipped(model)
            optimizer.step()
        else:
            with foreshock.attach(model, optimizer, clip=MAX_NORM):
                optimizer.step()
        results.append(whole(model))
    return {"apart": apart(*results)}


def refusals() -> dict[str, Any]:
    ranks = dist.get_world_size()
    mesh = mesh_of()

    def refused(model: nn.Module, parameters: Any = None) -> str | None:
        optimizer = torch.optim.SGD(list(model.parameters() if parameters is None else parameters), lr=0.1)
        return error_of(lambda: foreshock.attach(model, optimizer))

    parts = nn.Sequential(*layers())
    fully_shard(parts[0], mesh=mesh)
    ignoring = nn.Sequential(*layers())
    fully_shard(ignoring, mesh=mesh, ignored_params={ignoring[2].bias})  # type: ignore[arg-type]
    both = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "tensor"))
    plan: Any = {"0": ColwiseParallel(), "1.1": ColwiseParallel(), "2": ColwiseParallel()}

    def parallel(*names: str) -> nn.Module:
        model = nn.Sequential(*layers(width=24))
        parallelize_module(model, both["tensor"], {name: plan[name] for name in names})
        fully_shard(model, mesh=both["data"])
        return model

    class OnGpu:
        """A mesh of GPUs, whose shards an offload policy keeps on the CPU."""

        device_type, ndim, shape, get_group = "cuda", 1, mesh.shape, mesh.get_group

    place = models._placed
    models._placed = lambda parameter: (OnGpu, place(parameter)[1])  # type: ignore[index]
    offloaded = refused(make_model())
    models._placed = place
    return {
        "fsdp": refused(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))),
        "parts": refused(parts),
        "ignored": refused(ignoring),
        "tensor parallel": refused(parallel("0")),
        "tensor parallel everywhere": refused(parallel(*plan)),
        "offloaded": offloaded,
        "another": refused(make_model(), make_model().parameters()),
    }


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
