"""Scenarios of test_attach.py: how ranks attach together, or do not. Each rank runs it."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import BuiltinCommHookType
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.ring import Ring
from tests.agent.scenarios.training import (
    STEPS,
    environment,
    error_of,
    main,
    make_model,
    make_optimizer,
    same,
    told,
    train,
)


def stock() -> list[torch.Tensor]:
    model = make_model()
    return train(model, make_optimizer(model))


def outcome(*, on: set[int], model: Any = None, optimizer: Any = None, **wrong: Any) -> dict[str, Any]:
    """Attach with a mistake on some ranks, and train on."""
    good_model = make_model()
    good_optimizer = make_optimizer(good_model)
    mistaken = dist.get_rank() in on
    watches: list[foreshock.Watch] = []

    def attach() -> None:
        arguments = wrong if mistaken else {}
        watches.append(
            foreshock.attach(
                model if mistaken and model is not None else good_model,
                optimizer if mistaken and optimizer is not None else good_optimizer,
                **arguments,
            )
        )

    error = error_of(attach)
    hooked = len(good_model._comm_hooks) + len(good_optimizer._optimizer_step_pre_hooks)
    return {
        "error": error,
        "enabled": [watch.enabled for watch in watches],
        "hooks": hooked,
        "as stock": same(train(good_model, good_optimizer), stock()),
    }


def another_clip_on_rank_1() -> dict[str, Any]:
    return outcome(on={1}, clip=2.0)


def no_local_norms_on_rank_1() -> dict[str, Any]:
    return outcome(on={1}, local_norms=False)


def model_is_not_ddp_anywhere() -> dict[str, Any]:
    return outcome(on={0, 1}, model=nn.Linear(2, 2))


def model_is_not_ddp_on_rank_0() -> dict[str, Any]:
    return outcome(on={0}, model=nn.Linear(2, 2))


def model_is_not_ddp_on_rank_1() -> dict[str, Any]:
    return outcome(on={1}, model=nn.Linear(2, 2))


def optimizer_of_another_model() -> dict[str, Any]:
    return outcome(on={0}, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def optimizer_is_none() -> dict[str, Any]:
    return outcome(on={0, 1}, optimizer=make_model().parameters())


def negative_max_norm() -> dict[str, Any]:
    return outcome(on={0, 1}, clip=-1.0)


def bad_collector_on_rank_1() -> dict[str, Any]:
    return outcome(on={1}, collector="http://monitor:4327")


def bad_collector_variable() -> dict[str, Any]:
    with environment(COLLECTOR="monitor"):
        return outcome(on=set())


def misspelled_variable() -> list[bool]:
    enabled = []
    with environment(COLECTOR="monitor:4327"):
        for _ in range(2):
            model = make_model()
            with foreshock.attach(model, make_optimizer(model)) as watch:
                enabled.append(watch.enabled)
    return enabled


def sparse_gradients() -> dict[str, Any]:
    model = DistributedDataParallel(nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1)))
    return outcome(on={0, 1}, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def attached_twice() -> dict[str, Any]:
    model = make_model()
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer):
        again = error_of(lambda: foreshock.attach(model, optimizer))
    with foreshock.attach(model, optimizer) as watch:
        return {"again": again, "after detach": watch.enabled}


def disabled_on_rank_1() -> dict[str, Any]:
    with environment(DISABLED="1" if dist.get_rank() == 1 else ""):
        return outcome(on=set())


def disabled_on_rank_0() -> dict[str, Any]:
    with environment(DISABLED="1" if dist.get_rank() == 0 else ""):
        return outcome(on=set())


def disabled_with_wrong_arguments() -> dict[str, Any]:
    with environment(DISABLED="1"):
        return outcome(on={0, 1}, model=nn.Linear(2, 2), clip=-1.0, collector="nowhere")


def no_room_for_a_ring_on_rank_0() -> dict[str, Any]:
    return _no_room(0)


def no_room_for_a_ring_on_rank_1() -> dict[str, Any]:
    return _no_room(1)


def _no_room(rank: int) -> dict[str, Any]:
    # A file, where a folder would have to be.
    rings = Path(os.environ["FORESHOCK_RING_DIR"])
    before = set(rings.rglob("*.ring"))
    said: list[str] = []
    write_exit = Ring.write_exit

    def heard(ring: Ring, reason: ExitReason, detail: str = "") -> None:
        # Before its file goes: a recorder may have found it.
        said.append(reason.name * ring.path.exists())
        write_exit(ring, reason, detail)

    Ring.write_exit = heard  # type: ignore[method-assign, assignment]
    with environment(RING_DIR=__file__ if dist.get_rank() == rank else str(rings)):
        found = outcome(on=set())
    Ring.write_exit = write_exit  # type: ignore[method-assign]
    found["said"] = said
    found["rings"] = len(set(rings.rglob("*.ring")) - before)
    return found


def own_hook() -> dict[str, Any]:
    return _hooked(lambda model: model.register_comm_hook(None, allreduce_hook))


def own_hook_in_views() -> dict[str, Any]:
    return _hooked(lambda model: model.register_comm_hook(None, allreduce_hook), gradient_as_bucket_view=True)


def builtin_hook() -> dict[str, Any]:
    return _hooked(lambda model: model._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE))


def builtin_hook_in_views() -> dict[str, Any]:
    builtin = BuiltinCommHookType.ALLREDUCE
    return _hooked(lambda model: model._register_builtin_comm_hook(builtin), gradient_as_bucket_view=True)


def _hooked(hook: Any, **ddp: Any) -> dict[str, Any]:
    weights = []
    for watched in (False, True):
        model = make_model(**ddp)
        hook(model)
        optimizer = make_optimizer(model)
        watch = foreshock.attach(model, optimizer) if watched else foreshock.Watch()
        weights.append(train(model, optimizer))
        if watched:
            found = told(watch)
        watch.detach()
    return {
        "as alone": same(*weights),
        "global": [r["measured"]["global_norm"] for r in found["records"]],
        "local": [r["measured"]["local_norm"] for r in found["records"]],
        "dropped": found["dropped"],
    }


def the_stores_timeout() -> list[bool]:
    store = _get_default_store()
    before = store.timeout  # type: ignore[attr-defined]
    model = make_model()
    foreshock.attach(model, make_optimizer(model)).detach()
    return [store.timeout == before, before > timedelta(seconds=200)]  # type: ignore[attr-defined]


def resumed_and_told_before_the_step() -> list[int]:
    return _resumed(before=True)


def resumed_and_told_after_the_step() -> list[int]:
    return _resumed(before=False)


def _resumed(*, before: bool) -> list[int]:
    model = make_model()
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer) as watch:
        step = 12_000

        def observe(*_: Any) -> None:
            nonlocal step
            watch.observe(step=step)
            step += 1

        if before:
            train(model, optimizer, before_backward=observe)
        else:
            for _ in range(STEPS):
                train(model, optimizer, steps=1)
                observe()
        return [record["step"] for record in told(watch)["records"]]


def resumed_and_told_once() -> list[int]:
    model = make_model()
    optimizer = make_optimizer(model)
    with foreshock.attach(model, optimizer) as watch:
        watch.observe(step=12_000)
        train(model, optimizer)
        return [record["step"] for record in told(watch)["records"]]


def only_one_rank(caller: int) -> dict[str, Any]:
    """The other never calls attach; both train on."""
    model = make_model()
    optimizer = make_optimizer(model)
    error = error_of(lambda: foreshock.attach(model, optimizer)) if dist.get_rank() == caller else None
    return {"error": error, "as stock": same(train(model, optimizer), stock())}


def only_rank_0() -> dict[str, Any]:
    return only_one_rank(0)


def only_rank_1() -> dict[str, Any]:
    return only_one_rank(1)


def only_rank_0_and_nobody_catches_it() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    if dist.get_rank() == 0:
        foreshock.attach(model, optimizer)
    train(model, optimizer)


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
