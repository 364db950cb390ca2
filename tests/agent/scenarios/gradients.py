"""Scenarios of test_gradients.py: what is measured and clipped, beside stock PyTorch. Each rank runs it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from tests.agent.scenarios.training import (
    STEPS,
    WIDTH,
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
    train,
    wait_for_sums,
    weights,
)

SCALE = 1024.0


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def value_clip() -> list[bool]:
    """Stock on the left, ours on the right, bit for bit."""
    identical = []
    for kind, fused in (("AdamW", True), ("AdamW", False), ("SGD", False)):
        model = make_model()
        clip = lambda model=model: nn.utils.clip_grad_value_(model.parameters(), 0.05)  # noqa: E731
        stock = train(model, make_optimizer(model, kind, fused=fused), before_step=clip)
        model = make_model()
        optimizer = make_optimizer(model, kind, fused=fused)
        with foreshock.attach(model, optimizer, clip=foreshock.ValueClip(clip_value=0.05)):
            ours = train(model, optimizer)
        model = make_model()
        free = train(model, make_optimizer(model, kind, fused=fused))
        identical.append(same(stock, ours) and not same(stock, free))
    return identical


def bfloat16() -> dict[str, Any]:
    """One large parameter; every norm beside one in double precision, and beside one in bfloat16."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(512, 512).bfloat16())
    optimizer = make_optimizer(model, "SGD")
    found: dict[str, list[float]] = {"double": [], "narrow": []}

    def measure() -> None:
        found["double"].append(norm_of(gradients(model)))
        found["narrow"].append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients(model)]))))

    with foreshock.attach(model, optimizer) as watch:
        generator = batches(same=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(16, 512, generator=generator).bfloat16()
            (model(x) - x).square().sum().backward()
            measure()
            optimizer.step()
        seen = told(watch)
    return found | {"global": column(seen, "global_norm"), "local": column(seen, "local_norm")}


def scaler_fused() -> dict[str, Any]:
    return _scaled(fused=True)


def scaler_unfused() -> dict[str, Any]:
    return _scaled(fused=False)


def scaler_fused_unscaled_by_the_script() -> dict[str, Any]:
    return _scaled(fused=True, unscale=True)


def scaler_not_enabled() -> dict[str, Any]:
    """As scripts have it that may run in full precision too."""
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    scaler, norms, data = torch.amp.GradScaler("cpu", enabled=False), [], batches()
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        for _ in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            norms.append(norm_of(gradients(model)))
            scaler.step(optimizer)
            scaler.update()
        found = told(watch)
    return {
        "norms": norms,
        "global": column(found, "global_norm"),
        "scale": column(found, "loss_scale"),
        "dropped": found["dropped"],
    }


def _scaled(*, fused: bool, unscale: bool = False) -> dict[str, Any]:
    """The same batches on all ranks, so that local and global norms are alike. An overflow at step 3."""

    largest = []

    def run(watch_with: float | None) -> tuple[list[Tensor], list[float], dict[str, Any]]:
        model = make_model()
        optimizer = make_optimizer(model, fused=fused)
        watch = None if watch_with is None else foreshock.attach(model, optimizer, clip=watch_with)
        scaler, norms, data = torch.amp.GradScaler("cpu", init_scale=SCALE), [], batches(same=True)
        for step in range(8):
            optimizer.zero_grad()
            loss = loss_of(model, data)
            scaler.scale(loss * (math.inf if step == 3 else 1.0)).backward()  # type: ignore[no-untyped-call]
            if watch is None:
                scaler.unscale_(optimizer)
                largest.append(max(float(g.abs().max()) for g in gradients(model)))
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            else:
                if unscale:
                    scaler.unscale_(optimizer)
                wait_for_sums(watch)
            scaler.step(optimizer)
            scaler.update()
        found = {} if watch is None else told(watch)
        if watch is not None:
            watch.detach()
        return weights(model), norms, found

    stock, norms, _ = run(None)
    ours, _, found = run(0.5)
    return {
        "apart": apart(stock, ours),
        "norms": norms,
        "largest": largest,
        "dropped": found["dropped"],
        "edited": [record["edited"] for record in found["records"]],
        **{
            name: column(found, name)
            for name in (
                "global_norm", "local_norm", "loss_scale", "skipped", "clip_coefficient", "reduced_sequence",
                "reduced_square_sum", "gradient_absolute_maximum",
            )
        },
    }  # fmt: skip


def own_clip_fused() -> dict[str, Any]:
    return _own_clip(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5), fused=True)


def own_clip_unfused() -> dict[str, Any]:
    return _own_clip(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5), fused=False)


def own_clip_and_scaler_fused() -> dict[str, Any]:
    return _own_clip_and_scaler(fused=True)


def own_clip_and_scaler_unfused() -> dict[str, Any]:
    return _own_clip_and_scaler(fused=False)


def _own_clip_and_scaler(*, fused: bool) -> dict[str, Any]:
    """The usual mixed-precision script, left as it is. Its scale is no power of two, and doubles after every step."""
    norms: list[float] = []

    def run(watch_with: float | None) -> tuple[list[Tensor], dict[str, Any]]:
        model = make_model()
        optimizer = make_optimizer(model, fused=fused)
        watch = foreshock.Watch() if watch_with is None else foreshock.attach(model, optimizer, clip=watch_with)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=1)
        data = batches(same=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            if watch_with is not None:
                wait_for_sums(watch)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if watch_with is None:
                norms.append(float(norm))
            scaler.step(optimizer)
            scaler.update()
        found = {} if watch_with is None else told(watch)
        watch.detach()
        return weights(model), found

    alone, _ = run(None)
    ours, found = run(0.1)
    names = ("global_norm", "local_norm", "loss_scale", "reduced_square_sum", "clip_coefficient")
    return {"as alone": same(alone, ours), "norms": norms, **{name: column(found, name) for name in names}}


def own_value_clip() -> dict[str, Any]:
    return _own_clip(lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.05), fused=False)


def own_clip_through_data() -> dict[str, Any]:
    def clamp(model: nn.Module) -> None:
        for gradient in gradients(model):
            gradient.data.clamp_(-0.05, 0.05)

    return _own_clip(clamp, fused=True, steps=12)


def own_clip_by_new_data() -> dict[str, Any]:
    def scale(model: nn.Module) -> None:
        factor = 0.3 / norm_of(gradients(model))
        for gradient in gradients(model):
            gradient.data = gradient.data * factor

    return _own_clip(scale, fused=False, steps=12)


def own_clip_of_the_middle() -> dict[str, Any]:
    def clip(model: Any) -> None:
        nn.utils.clip_grad_norm_(model.module[2].parameters(), 0.1)

    return _own_clip(clip, fused=True, steps=12)


def _own_clip(clip: Callable[[nn.Module], Any], *, fused: bool, steps: int = STEPS) -> dict[str, Any]:
    model = make_model()
    norms: list[float] = []

    def note_and_clip() -> None:
        norms.append(norm_of(gradients(model)))
        clip(model)

    alone = train(model, make_optimizer(model, fused=fused), steps=steps, before_step=note_and_clip)
    model = make_model()
    optimizer = make_optimizer(model, fused=fused)
    with foreshock.attach(model, optimizer, clip=0.1) as watch:
        noted, norms = norms, []
        ours = train(model, optimizer, steps=steps, before_step=note_and_clip)
        found = told(watch)
    return {
        "as alone": same(alone, ours),
        "norms": noted,
        "norms of ours": norms,
        "edited": [record["edited"] for record in found["records"]],
        "global": column(found, "global_norm"),
        "coefficient": column(found, "clip_coefficient"),
    }


def alone() -> dict[str, Any]:
    """For a job of one rank: a NaN and an Inf under a scaler, beside a parameter that nobody uses."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Spare(), find_unused_parameters=True)
    optimizer = make_optimizer(model, fused=True)
    weight, bias = model.module.body.weight, model.module.body.bias
    bad = {2: (math.nan, math.inf), 4: (0.0, math.inf)}
    now = 0

    def spoil(gradient: Tensor, which: int) -> Tensor:
        return gradient + bad.get(now, (0.0, 0.0))[which]

    weight.register_hook(lambda g: spoil(g, 0))
    bias.register_hook(lambda g: spoil(g, 1))
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=SCALE), []
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        data = batches()
        for step in range(STEPS):
            now = step
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()  # type: ignore[no-untyped-call]
            norms.append(norm_of(gradients(model)) / scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        found = told(watch)
    names = (
        "global_norm", "local_norm", "first_nonfinite_global", "first_nonfinite_local", "local_nan_parameters",
        "local_inf_parameters", "loss_scale", "reduced_sequence",
    )  # fmt: skip
    return {"norms": norms, **{name: column(found, name) for name in names}}


class Spare(nn.Module):
    """A branch that only rank 1 takes, and a parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 1)
        self.branch = nn.Linear(WIDTH, 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return y + self.branch(x) if dist.get_rank() == 1 else y


def unused_parameters() -> dict[str, Any]:
    def run(*, watched: bool) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        model = DistributedDataParallel(Spare(), find_unused_parameters=True)
        optimizer = make_optimizer(model)
        watch = foreshock.attach(model, optimizer, clip=0.5) if watched else foreshock.Watch()
        clip = (lambda: None) if watched else (lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        ours = train(model, optimizer, before_step=clip)
        found = told(watch) if watched else {}
        watch.detach()
        return ours, found

    stock, _ = run(watched=False)
    ours, found = run(watched=True)
    return {
        "apart": apart(stock, ours),
        "norms": [*column(found, "global_norm"), *column(found, "local_norm")],
        "nan": sum(column(found, "global_nan_parameters") + column(found, "local_nan_parameters")),
        "first": sorted({*column(found, "first_nonfinite_global"), *column(found, "first_nonfinite_local")}),
        "dropped": found["dropped"],
    }


def accumulated() -> dict[str, Any]:
    """Three backward passes for a step: the local norm is that of their sum, by a model that is none of DDP's."""
    model = make_model()
    optimizer = make_optimizer(model, "SGD")
    found: dict[str, list[float]] = {"expected local": [], "expected global": []}
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        data, copy = batches(), batches()
        for _ in range(STEPS):
            alone = make_model().module
            alone.load_state_dict(model.module.state_dict())
            for _ in range(3):
                loss_of(alone, copy).backward()  # type: ignore[no-untyped-call]
            found["expected local"].append(norm_of(gradients(alone)))
            optimizer.zero_grad()
            for part in range(3):
                with model.no_sync() if part < 2 else nullcontext():
                    loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            found["expected global"].append(norm_of(gradients(model)))
            optimizer.step()
        seen = told(watch)
    return found | {
        "local": column(seen, "local_norm"),
        "global": column(seen, "global_norm"),
        "alike": alike(weights(model)),
    }


def a_step_that_raised() -> dict[str, Any]:
    """The optimizer raises once, in the middle of a step that clips: the next one must not start from its divisor."""
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    failing = False

    def fail(*_: Any) -> None:
        if failing:
            raise RuntimeError("out of luck")

    norms: list[float] = []
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        optimizer.register_step_pre_hook(fail)
        data = batches()
        for step in range(4):
            failing = step == 1
            optimizer.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            norms.append(norm_of(gradients(model)))
            try:
                optimizer.step()
            except RuntimeError:
                assert failing
        found = told(watch)
        left = getattr(optimizer, "grad_scale", None)
    return {
        "norms": norms,
        "global": column(found, "global_norm"),
        "scale": column(found, "loss_scale"),
        "left": left,
    }


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
