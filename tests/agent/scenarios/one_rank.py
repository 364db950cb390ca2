"""Scenarios of test_one_rank.py: DDP models of one rank. Each rank runs it, with a group of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock._torch import GradBucket, has_comm_hook
from tests.agent.scenarios.training import batches, column, loss_of, main, make_model, make_optimizer, same, told, train


def of_one_rank(**ddp: Any) -> DistributedDataParallel:
    return make_model(process_group=_own_group(), **ddp)


@functools.cache
def _own_group() -> Any:
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def as_stock(**ddp: Any) -> dict[str, Any]:
    """A training that is observed, beside one that is not."""
    model = of_one_rank(**ddp)
    theirs = train(model, make_optimizer(model))
    model = of_one_rank(**ddp)
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer) as watch:
        free = not has_comm_hook(model)
        ours = train(model, optimizer)
        found = told(watch)
    norms = {name: column(found, name) for name in ("global_norm", "local_norm")}
    return {
        "same": same(theirs, ours),
        "free": free,
        "hook": has_comm_hook(model),
        "dropped": found["dropped"],
        **norms,
    }


def with_the_scripts_hook() -> dict[str, Any]:
    """A script that registers its hook after attach."""
    passes = []

    def own(state: Any, bucket: GradBucket) -> Any:
        passes.append(bucket.is_last())
        return noop_hook(state, bucket)

    model = of_one_rank()
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer) as watch:
        # Not a function's own annotations: DDP compares them with the classes themselves.
        own.__annotations__.clear()
        model.register_comm_hook(None, own)
        train(model, optimizer)
        dropped = told(watch)["dropped"]
    return {"passes": sum(passes), "dropped": dropped}


def with_another_group() -> Any:
    """A rank alone, whose model gets the group of all ranks: their gradients are averaged again."""
    model = of_one_rank()
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer):
        train(model, optimizer)
        stock = make_model()
        stock.module.load_state_dict(model.module.state_dict())
        model._update_process_group(dist.group.WORLD)  # type: ignore[no-untyped-call]
        for each in (model, stock):
            each.zero_grad()
            loss_of(each, batches()).backward()  # type: ignore[no-untyped-call]
    return same([p.grad for p in model.parameters()], [p.grad for p in stock.parameters()])  # type: ignore[misc]


SCENARIOS: dict[str, Callable[[], Any]] = {
    "plain": as_stock,
    "views": functools.partial(as_stock, gradient_as_bucket_view=True),
    "static": functools.partial(as_stock, static_graph=True),
    "unused": functools.partial(as_stock, find_unused_parameters=True),
    "own_hook": with_the_scripts_hook,
    "another_group": with_another_group,
}

if __name__ == "__main__":
    main(SCENARIOS)
