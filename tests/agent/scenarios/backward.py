"""Scenarios of test_backward.py: backward passes that are no single plain one. Each rank runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import foreshock
from tests.agent.scenarios.training import (
    WIDTH,
    active,
    alike,
    apart,
    batches,
    column,
    loss_of,
    main,
    make_model,
    make_optimizer,
    same,
    told,
    wait_for_sums,
    weights,
)

STEPS, MAX_NORM = 6, 0.5


class Checkpointed(nn.Module):
    """Layers under reentrant checkpointing: each has a backward pass of its own inside the outer one."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in order)
        self.order = order

    def forward(self, x: Tensor) -> Any:
        x = x.detach().requires_grad_()
        for i in self.order:
            x = checkpoint(lambda t, i=i: torch.tanh(self.layers[i](t)), x, use_reentrant=True)
        return x.sum(1, keepdim=True)


def _checkpointed(order: tuple[int, ...], **ddp: Any) -> dict[str, Any]:
    def make() -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = DistributedDataParallel(Checkpointed(order), **ddp)
        return model, make_optimizer(model)

    def train(model: Any, optimizer: Any, before_step: Callable[[], Any]) -> list[Tensor]:
        data = batches()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            before_step()
            optimizer.step()
        return weights(model)

    norms: list[float] = []
    model, optimizer = make()
    stock = train(model, optimizer, lambda: norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))))
    ours, optimizer = make()
    with foreshock.attach(ours, optimizer, clip=MAX_NORM) as watch:
        found = {"apart": apart(stock, train(ours, optimizer, lambda: wait_for_sums(watch)))}
        seen = told(watch)
    found |= {"alike": alike(weights(ours)), "own": _own_norm(order)}
    names = ("global_norm", "local_norm", "reduced_sequence")
    return found | {name: column(seen, name) for name in names} | {"norms": norms, "dropped": seen["dropped"]}


def _own_norm(order: tuple[int, ...]) -> float:
    """This rank's own gradient at the first step, by a model that is none of DDP's."""
    torch.manual_seed(0)
    alone = Checkpointed(order)
    loss_of(alone, batches()).backward()  # type: ignore[no-untyped-call]
    return float(nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.grad is not None]))


def checkpointed() -> dict[str, Any]:
    return _checkpointed((0, 1, 2, 3, 4, 5))


def checkpointed_in_another_order() -> dict[str, Any]:
    return _checkpointed((1, 0, 2, 3, 4, 5))


def checkpointed_in_a_static_graph() -> dict[str, Any]:
    return _checkpointed((0, 1, 2, 3, 4, 5), static_graph=True)


def checkpointed_in_bucket_views() -> dict[str, Any]:
    return _checkpointed((1, 0, 2, 3, 4, 5), gradient_as_bucket_view=True)


def _beside_alone(step: Callable[[Any, torch.Generator], Any]) -> dict[str, Any]:
    """Trainings whose backward passes are made by `step`, observed and alone, bit for bit."""

    def run(*, watched: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model = make_model()
        optimizer, data = make_optimizer(model, "SGD"), batches()
        watch = foreshock.attach(model, optimizer) if watched else foreshock.Watch()
        for _ in range(STEPS):
            optimizer.zero_grad()
            step(model, data)
            if watched:
                wait_for_sums(watch)
            optimizer.step()
        found = told(watch) if watched else {}
        watch.detach()
        return weights(model), found

    alone, _ = run(watched=False)
    ours, found = run(watched=True)
    names = ("local_norm", "reduced_sequence", "reduced_idle_ranks")
    return {"as alone": same(alone, ours), "dropped": found["dropped"], **{n: column(found, n) for n in names}}


def twice_on_rank_1() -> dict[str, Any]:
    """DDP averages in the first of two passes through one graph. Rank 1 alone makes a second one."""

    def step(model: Any, data: torch.Generator) -> None:
        loss = loss_of(model, data)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if dist.get_rank() == 1:
            loss.backward()  # type: ignore[no-untyped-call]

    return _beside_alone(step)


def accumulated_with_backward_outside() -> dict[str, Any]:
    """What counts for DDP is where the forward pass was."""

    def step(model: Any, data: torch.Generator) -> None:
        for part in range(3):
            with model.no_sync() if part < 2 else nullcontext():
                loss = loss_of(model, data)
            loss.backward()  # type: ignore[no-untyped-call]

    return _beside_alone(step)


def evaluated_before_backward() -> dict[str, Any]:
    """A forward pass without gradients lies between a forward pass and its backward pass."""

    def step(model: Any, data: torch.Generator) -> None:
        loss = loss_of(model, data)
        with torch.no_grad():
            model(torch.zeros(2, WIDTH))
        loss.backward()  # type: ignore[no-untyped-call]

    return _beside_alone(step)


def detached_on_rank_1() -> dict[str, Any]:
    """A rank that has detached takes part in the sums, and adds nothing."""
    model = make_model()
    optimizer, data = make_optimizer(model), batches()
    watch = foreshock.attach(model, optimizer)
    for step in range(STEPS):
        if step == 3 and dist.get_rank() == 1:
            watch.detach()
        optimizer.zero_grad()
        loss_of(model, data).backward()  # type: ignore[no-untyped-call]
        if dist.get_rank() == 0:
            wait_for_sums(watch)
        optimizer.step()
    found = told(watch)
    active(watch).detach()
    return {name: column(found, name) for name in ("reduced_sequence", "reduced_idle_ranks")}


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
