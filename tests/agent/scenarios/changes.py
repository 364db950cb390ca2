"""Scenarios of test_changes.py: what scripts do with a watched model and optimizer after attach. Each rank runs it."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import foreshock
from foreshock import _watch
from foreshock._output.leaving import Ending
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.reader import RingReader
from tests.agent.scenarios.training import (
    STEPS,
    active,
    apart,
    batches,
    loss_of,
    main,
    make_model,
    make_optimizer,
    ring_of,
    same,
    told,
    weights,
)

MAX_NORM = 0.5
Change = Callable[[int, DistributedDataParallel, torch.optim.Optimizer], Any]


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(
    change: Change, *, fused: bool, watched: bool, trains: slice = slice(None), **ddp: Any
) -> tuple[list[Tensor], list[float], dict[str, Any]]:
    """A training that is changed before some steps: its weights, norms, and what was told. trains: these modules."""
    model = make_model(**ddp)
    optimizer = torch.optim.AdamW(model.module[trains].parameters(), lr=0.01, fused=fused)
    watch = foreshock.attach(model, optimizer, clip=MAX_NORM) if watched else foreshock.Watch()
    data, norms = batches(), []
    for step in range(STEPS):
        change(step, model, optimizer)
        model.zero_grad()
        loss_of(model, data).backward()  # type: ignore[no-untyped-call]
        if not watched:
            norms.append(float(nn.utils.clip_grad_norm_(held(optimizer), MAX_NORM)))
        optimizer.step()
    found = told(watch) if watched else {}
    watch.detach()
    return weights(model), norms, found


def beside_stock(change: Change, **options: Any) -> dict[str, Any]:
    stock, norms, _ = run(change, watched=False, **options)
    ours, _, found = run(change, watched=True, **options)
    return {
        "apart": apart(stock, ours),
        "norms": norms,
        "global": [record["measured"]["global_norm"] for record in found["records"]],
        "local": [record["measured"]["local_norm"] for record in found["records"]],
        "dropped": found["dropped"],
    }


def unfused_checkpoint() -> dict[str, Any]:
    """`load_state_dict` brings the `fused` of the checkpoint's optimizer along."""
    model = make_model()
    other = make_optimizer(model, fused=False)
    loss_of(model, batches()).backward()  # type: ignore[no-untyped-call]
    other.step()
    checkpoint = copy.deepcopy(other.state_dict())

    def load(step: int, _: Any, optimizer: torch.optim.Optimizer) -> None:
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(checkpoint))

    return beside_stock(load, fused=True)


def fused_checkpoint() -> dict[str, Any]:
    checkpoint = make_optimizer(make_model(), fused=True).state_dict()

    def load(step: int, _: Any, optimizer: torch.optim.Optimizer) -> None:
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(checkpoint))

    return beside_stock(load, fused=False)


def _body_joins(step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    if step == 3:
        optimizer.add_param_group({"params": list(model.module[:4].parameters()), "lr": 0.001})


def joins_fused() -> dict[str, Any]:
    return beside_stock(_body_joins, fused=True, trains=slice(4, None))


def joins_unfused() -> dict[str, Any]:
    return beside_stock(_body_joins, fused=False, trains=slice(4, None))


def leaves() -> dict[str, Any]:
    def shrink(step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if step == 3:
            gone = set(model.module[0].parameters())
            group = optimizer.param_groups[0]
            group["params"] = [p for p in group["params"] if p not in gone]

    return beside_stock(shrink, fused=True)


def freezes_and_unfreezes() -> dict[str, Any]:
    def freeze(step: int, model: Any, _: Any) -> None:
        if step in (2, 4):
            model.module[0].requires_grad_(step == 4)
            model.zero_grad()

    return beside_stock(freeze, fused=True, find_unused_parameters=True)


def schedules() -> dict[str, Any]:
    schedulers: dict[int, Any] = {}

    def schedule(step: int, _: Any, optimizer: torch.optim.Optimizer) -> None:
        if step == 0:
            schedulers[id(optimizer)] = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        else:
            schedulers[id(optimizer)].step()

    return beside_stock(schedule, fused=True)


def saves_and_loads() -> dict[str, Any]:
    """State dicts of both, with hooks of the script's, before each step."""

    def save(_: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        handles = [
            optimizer.register_state_dict_post_hook(lambda *_: None),
            optimizer.register_load_state_dict_pre_hook(lambda *_: None),
            model.register_load_state_dict_post_hook(lambda *_: None),
        ]
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        for handle in handles:
            handle.remove()

    return beside_stock(save, fused=True)


def moves() -> dict[str, Any]:
    def move(_: int, model: Any, __: Any) -> None:
        model.to("cpu")
        model.train(mode=True)

    return beside_stock(move, fused=True)


def averages() -> dict[str, Any]:
    """An exponential moving average, made from the watched model and updated with it."""
    kept: dict[int, AveragedModel] = {}

    def average(step: int, model: Any, _: Any) -> None:
        if step == 0:
            kept[id(model)] = AveragedModel(model)
        else:
            kept[id(model)].update_parameters(model)

    return beside_stock(average, fused=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: AveragedModel(model).module,
    "save": lambda model: _reloaded(model),
}


def _reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _copies(prepare: Callable[[DistributedDataParallel], Any], **ddp: Any) -> dict[str, Any]:
    found = {}
    for name, make in COPIES.items():
        model = make_model(**ddp)
        prepare(model)
        optimizer = make_optimizer(model, fused=True)
        data = batches()
        watch = foreshock.attach(model, optimizer, clip=MAX_NORM)

        def train(model: Any, optimizer: Any, data: torch.Generator = data) -> None:
            optimizer.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        train(model, optimizer)
        twin = make(model)
        copy.deepcopy(optimizer)
        with ring_of(watch) as path:
            passes = RingReader(path).backward_passes
        # It trains by itself, and writes nothing into the original's ring.
        stock = make_model(**ddp)
        stock.load_state_dict(twin.state_dict())
        start = data.get_state()
        train(twin, make_optimizer(twin))
        data.set_state(start)
        train(stock, make_optimizer(stock))
        record = told(watch)
        silent = len(record["records"]) == 1 and record["passes"] == passes
        train(model, optimizer)
        goes_on = len(told(watch)["records"]) == 2
        watch.detach()
        make(model)
        found[name] = {"as stock": same(weights(stock), weights(twin)), "silent": silent, "goes on": goes_on}
    return found


def copies() -> dict[str, Any]:
    return _copies(lambda _: None)


def copies_with_bucket_views() -> dict[str, Any]:
    return _copies(lambda _: None, gradient_as_bucket_view=True)


def copies_with_a_wrapped_hook() -> dict[str, Any]:
    return _copies(lambda model: model.register_comm_hook(None, foreshock.local_norms_wrapper(allreduce_hook)))


def odd_observations() -> dict[str, Any]:
    model = make_model()
    optimizer, data = make_optimizer(model), batches()
    with foreshock.attach(model, optimizer) as watch:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, data)
            step: Any = "7" if i % 2 else i / 5
            watch.observe(loss=loss, step=step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = told(watch)
    return {
        "steps": [record["step"] for record in found["records"]],
        "told": [record["loss"] is not None and record["measured"] is not None for record in found["records"]],
        "dropped": found["dropped"],
    }


def nothing_keeps_a_model() -> dict[str, Any]:
    """Nobody detaches; model and optimizer go."""
    model = make_model()
    optimizer = make_optimizer(model)
    watch = foreshock.attach(model, optimizer)
    loss_of(model, batches()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    ring = active(watch)._record.ring
    alive = [weakref.ref(model), weakref.ref(model.module), weakref.ref(next(model.parameters()))]
    try:
        raise KeyError("of something else")
    except KeyError:
        # Where a model goes is chance: garbage may be collected anywhere.
        del model, optimizer, watch
        gc.collect()
    return {"alive": sum(reference() is not None for reference in alive), "exit": _exit_reason(ring)}


def only_the_model_goes() -> dict[str, Any]:
    model = make_model()
    optimizer = make_optimizer(model)
    watch = foreshock.attach(model, optimizer)
    loss_of(model, batches()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    enabled = watch.enabled
    inner = model.module
    del model
    gc.collect()
    again = DistributedDataParallel(inner)
    second = foreshock.attach(again, optimizer)
    found = {"before": enabled, "after": watch.enabled, "second": second.enabled}
    second.detach()
    return found


def _exit_reason(ring: Any) -> str:
    import tempfile
    from pathlib import Path

    with tempfile.NamedTemporaryFile(suffix=".ring") as file:
        file.write(ring.memory[:])
        file.flush()
        return RingReader(Path(file.name)).exit_reason.name


def a_sweep() -> dict[str, Any]:
    """One training after another; all are kept, and nobody detaches."""
    kept, numbers = [], []
    for _ in range(3):
        model = make_model()
        optimizer, data = make_optimizer(model), batches()
        watch = foreshock.attach(model, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watch.observe(step=step)
        numbers.append([record["step"] for record in told(watch)["records"]])
        kept.append((model, optimizer, watch))
    found: dict[str, Any] = {"idle": [active(watch).idle for _, _, watch in kept], "steps": numbers}
    for _, _, watch in kept:
        active(watch).leave(Ending(ExitReason.EXCEPTION), wait=False)
    found["exits"] = [_exit_reason(active(watch)._record.ring) for _, _, watch in kept]
    return found


def in_turn() -> dict[str, Any]:
    """Two models, one for some steps and then the other: idle or not, each is clipped as stock clips it."""

    def pair() -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
        model = make_model()
        return model, make_optimizer(model)

    def trained(pairs: Any, *, watched: bool) -> tuple[list[Tensor], list[foreshock.Watch]]:
        watches = [foreshock.attach(*pair, clip=MAX_NORM) for pair in pairs] if watched else []
        data = batches()
        for turn in range(4):
            model, optimizer = pairs[turn % 2]
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model, data).backward()  # type: ignore[no-untyped-call]
                if not watched:
                    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
        return [weight for model, _ in pairs for weight in weights(model)], watches

    pairs = [pair(), pair()]
    stock, _ = trained([pair(), pair()], watched=False)
    # Each step looks for trainings that are idle, not one in five seconds.
    with patch.object(_watch, "CHECK_SECONDS", 0.0):
        ours, watches = trained(pairs, watched=True)
    first, second = map(active, watches)
    found: dict[str, Any] = {"apart": apart(stock, ours), "idle": [first.idle, second.idle]}
    found["steps"] = [[record["step"] for record in told(watch)["records"]] for watch in watches]
    found["exits"] = [_exit_reason(watch._record.ring) for watch in (first, second)]
    # What is attached to anew is watched by one.
    again = foreshock.attach(*pairs[0], clip=MAX_NORM)
    found["again"] = [first.enabled, again.enabled]
    for watch in (second, again):
        watch.detach()
    return found


if __name__ == "__main__":
    scenarios = {name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)}
    assert dist
    main(scenarios)
