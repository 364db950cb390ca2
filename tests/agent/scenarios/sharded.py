"""Scenarios of test_sharded.py: models that `fully_shard` has sharded, beside stock clipping. Each rank runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import foreshock
from tests.agent.scenarios.training import (
    WIDTH,
    alike,
    apart,
    batches,
    column,
    loss_of,
    main,
    same,
    told,
)

STEPS = {2: 20}
"""By number of ranks; else ten."""
MAX_NORM = 0.5
MAX_VALUE = 0.05


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def mesh_of(*, replicas: int = 1) -> DeviceMesh:
    ranks = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (ranks,))
    return init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def layers(*, width: int = 25) -> list[nn.Module]:
    """Of odd sizes, whose shards differ, and are empty on some ranks."""
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, width), nn.Sequential(nn.Tanh(), nn.Linear(width, 24), nn.Tanh()), nn.Linear(24, 1)]


def make_model(
    *, replicas: int = 1, wrap: Callable[[nn.Module], nn.Module] = lambda module: module, **options: Any
) -> nn.Sequential:
    """wrap: what is done with the block in the middle."""
    mesh = mesh_of(replicas=replicas)
    first, block, last = layers()
    model = nn.Sequential(first, wrap(block), last)
    fully_shard(model[0], mesh=mesh, **options)
    fully_shard(model[1], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole(model: nn.Module) -> list[Tensor]:
    """Its weights."""
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    return [p.full_tensor().detach().clone() for p in parameters]


def clipped(model: nn.Module) -> float:
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return float(norm.full_tensor())


def measured(model: nn.Module) -> float:
    norm: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(norm.full_tensor())


Observe = Callable[[Tensor], Any]


def clipped_elements(model: nn.Module) -> float:
    norm = measured(model)
    nn.utils.clip_grad_value_(model.parameters(), MAX_VALUE)
    return norm


def backward(
    model: nn.Module, data: torch.Generator, observe: Observe = lambda _: None, *, parts: int = 1, sync: bool = False
) -> None:
    """One pass, or several parts whose last loss is observed. sync: each part reduces its gradients."""
    sharded: Any = model
    for part in range(parts):
        last = part == parts - 1
        sharded.set_requires_gradient_sync(sync or last)
        loss = loss_of(model, data)
        if last:
            observe(loss)
        loss.backward()  # type: ignore[no-untyped-call]


Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return fused_of(model.parameters())


def fused_of(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def unfused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def beside_stock(
    make: Callable[[], nn.Module],
    optimizer_of: Optimizer,
    *,
    clip: Any = MAX_NORM,
    steps: int | None = None,
    train: Callable[[nn.Module, torch.Generator, Observe], Any] = backward,
    between: Callable[[nn.Module, torch.optim.Optimizer, int], Any] = lambda *_: None,
    scaler: Callable[[], torch.amp.GradScaler] | None = None,
) -> dict[str, Any]:
    """Train twice, with and without Foreshock. between: before each backward pass."""
    norm = measured if clip is None else clipped_elements if isinstance(clip, foreshock.ValueClip) else clipped

    def run(*, stock: bool) -> tuple[list[Tensor], list[float], dict[str, Any]]:
        model = make()
        optimizer, data, norms = optimizer_of(model), batches(), []
        scales = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler()
        watch = None if stock else foreshock.attach(model, optimizer, clip=clip)
        for step in range(steps or STEPS.get(dist.get_world_size(), 10)):
            between(model, optimizer, step)
            optimizer.zero_grad()
            if scaler is None:
                train(model, data, (lambda _: None) if watch is None else lambda loss: watch.observe(loss=loss))
            else:
                scales.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            if stock:
                if scaler is not None:
                    scales.unscale_(optimizer)
                norms.append(norm(model))
            scales.step(optimizer)
            scales.update()
        found = {} if watch is None else told(watch)
        if watch is not None:
            watch.detach()
        return whole(model), norms, found

    weights, norms, _ = run(stock=True)
    ours, _, found = run(stock=False)
    return {
        "same": same(weights, ours),
        "apart": apart(weights, ours),
        "alike": alike(ours),
        "norms": norms,
        "ours": column(found, "global_norm"),
        "coefficients": column(found, "clip_coefficient"),
        "local": column(found, "local_norm"),
        "sums": column(found, "reduced_sequence"),
        "losses": column(found, "reduced_loss_count"),
        "dropped": found["dropped"],
        "passes": found["passes"],
        "edited": [record["edited"] for record in found["records"]],
        "layers": len(ours) // 2,
    }


def observed() -> dict[str, Any]:
    return beside_stock(make_model, fused, clip=None)


def clipped_fused() -> dict[str, Any]:
    return beside_stock(make_model, fused)


def clipped_unfused() -> dict[str, Any]:
    return beside_stock(make_model, unfused)


def observed_replicas() -> dict[str, Any]:
    return beside_stock(lambda: make_model(replicas=2), fused, clip=None)


def clipped_replicas() -> dict[str, Any]:
    return beside_stock(lambda: make_model(replicas=2), fused)


def accumulated() -> dict[str, Any]:
    return beside_stock(make_model, fused, train=partial(backward, parts=3), steps=6)


def accumulated_and_reduced() -> dict[str, Any]:
    return beside_stock(make_model, fused, train=partial(backward, parts=3, sync=True), steps=6)


def mixed_precision() -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return beside_stock(lambda: make_model(mp_policy=policy), fused, steps=6)


def not_resharded() -> dict[str, Any]:
    return beside_stock(lambda: make_model(reshard_after_forward=False), fused, steps=6)


def checkpointed() -> dict[str, Any]:
    return beside_stock(lambda: make_model(wrap=lambda block: Checkpointed(block, reentrant=False)), fused, steps=6)


def checkpointed_reentrant() -> dict[str, Any]:
    return beside_stock(lambda: make_model(wrap=lambda block: Checkpointed(block, reentrant=True)), fused, steps=6)


def clipped_by_value() -> dict[str, Any]:
    return beside_stock(make_model, unfused, clip=foreshock.ValueClip(clip_value=MAX_VALUE), steps=6)


def compiled() -> dict[str, Any]:
    def make() -> nn.Module:
        model = make_model()
        model[1].compile(backend="eager")
        model.compile(backend="eager")
        return model

    return beside_stock(make, fused, steps=6)


def after_an_evaluation() -> dict[str, Any]:
    """The root stays gathered after a forward pass without a backward pass."""

    def make() -> nn.Module:
        model = make_model()
        fused(model)
        return model

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = fused(model)
        with torch.no_grad():
            loss_of(model, batches())
        return optimizer

    return beside_stock(make, optimizer_of, steps=6)


def resumed() -> dict[str, Any]:
    """Weights and moments as a distributed checkpoint has them, loaded into the model that trains."""

    def reload(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 3:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)

    return beside_stock(make_model, fused, steps=6, between=reload)


def frozen() -> dict[str, Any]:
    """A layer that is frozen and sharded, beside a parameter that is frozen and not."""

    def make() -> nn.Module:
        model = nn.Sequential(*layers())
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        ignored: set[Any] = {model[2].bias}
        fully_shard(model, mesh=mesh_of(), ignored_params=ignored)
        return model

    return beside_stock(make, lambda model: fused_of(p for p in model.parameters() if p.requires_grad), steps=6)


def scaled_fused() -> dict[str, Any]:
    return beside_stock(make_model, fused, steps=6, scaler=lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))


def scaled_unfused() -> dict[str, Any]:
    return beside_stock(make_model, unfused, steps=6, scaler=lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))


def adaptive() -> dict[str, Any]:
    """No stock clipping does that; ranks must agree, and by their own history."""
    return beside_stock(make_model, fused, clip=foreshock.AdaptiveClip(max_norm=MAX_NORM), steps=6)


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
