"""Scenarios of test_alone.py: a process that trains without a process group, and models as trainers hand them over."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foreshock
from tests.agent.scenarios.training import WIDTH, apart, column, error_of, loss_of, main, same, told, weights

STEPS, MAX_NORM = 6, 0.5
Step = Callable[[nn.Module, torch.optim.Optimizer, torch.Generator], Any]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


class Checkpointed(nn.Module):
    """Recomputes its activations in backward passes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


class WithUnused(nn.Module):
    """Has a head that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.layers = layers()

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Wraps as Accelerate does: an optimizer by class alone, without its state and its hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class LightningOptimizer:
    """Wraps as Lightning does: no optimizer by class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class FabricModule(nn.Module):
    """Wraps as Lightning's Fabric does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    def forward(self, x: Tensor) -> Any:
        return self._forward_module(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Generator) -> None:
    optimizer.zero_grad()
    loss_of(model, data).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def accumulated_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Generator) -> None:
    optimizer.zero_grad()
    for _ in range(3):
        (loss_of(model, data) / 3).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Generator) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def stock(model: nn.Module, optimizer: Any, step: Step, clip: float | None) -> tuple[list[Tensor], list[float]]:
    """Weights and norms of a training that clips by itself."""
    norms: list[float] = []

    def measure(*_: object) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))

    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    if step is closure_step:
        # Before the first closure there is no gradient to clip.
        return [], []
    inner.register_step_pre_hook(measure)
    data = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        step(model, optimizer, data)
    return weights(model), norms


def trained(
    build: Callable[[], nn.Module] = layers,
    step: Step = plain_step,
    *,
    optimizer: Callable[[nn.Module], Any] = adamw,
    wrap: Callable[[Any], Any] = lambda optimizer: optimizer,
    clip: float | None = MAX_NORM,
) -> dict[str, Any]:
    """A training beside one that clips by itself."""
    model = build()
    theirs, norms = stock(model, wrap(optimizer(model)), step, clip)
    model = build()
    held = wrap(optimizer(model))
    watch = foreshock.attach(model, held, clip=clip)
    data = torch.Generator().manual_seed(7)
    for number in range(STEPS):
        watch.observe(loss=float(number), step=number)
        step(model, held, data)
    found = told(watch)
    watch.detach()
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    return {
        "norms": norms,
        "global": column(found, "global_norm"),
        "local": column(found, "local_norm"),
        "losses": [record["loss"] for record in found["records"]],
        "steps": [record["step"] for record in found["records"]],
        "stepped": all(record["stepped"] and not record["edited"] for record in found["records"]),
        "apart": apart(theirs, weights(model)) if theirs else 0.0,
        "same": same(theirs, weights(model)) if theirs else None,
        "dropped": found["dropped"],
        "hooks": sum(len(each or ()) for each in hooks),
    }


def compiled() -> nn.Module:
    model: nn.Module = torch.compile(layers(), backend="eager")  # type: ignore[assignment]
    return model


def clips_by_itself() -> dict[str, Any]:
    model = layers()
    optimizer = adamw(model)
    watch, data, norms = foreshock.attach(model, optimizer, clip=0.1), torch.Generator().manual_seed(7), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, data).backward()  # type: ignore[no-untyped-call]
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    found = told(watch)
    watch.detach()
    return {
        "norms": norms,
        "global": column(found, "global_norm"),
        "coefficients": column(found, "clip_coefficient"),
        "edited": [record["edited"] for record in found["records"]],
    }


def skips_a_step() -> list[Any]:
    model = layers()
    optimizer = adamw(model)
    watch, data = foreshock.attach(model, optimizer), torch.Generator().manual_seed(7)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data) * (float("nan") if number == 3 else 1.0)
        watch.observe(loss=loss, step=number)
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.isfinite(loss):
            optimizer.step()
    found = told(watch)["records"]
    watch.detach()
    return [(record["step"], record["stepped"]) for record in found]


@contextlib.contextmanager
def world_size(size: str) -> Iterator[None]:
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = size
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = before


def refusals() -> dict[str, Any]:
    model, other = layers(), layers()
    with world_size("2"):
        early = error_of(lambda: foreshock.attach(model, adamw(model)))
    first = foreshock.attach(model, adamw(model))
    again = error_of(lambda: foreshock.attach(model, adamw(model)))
    first.detach()
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    return {
        "before the process group": early,
        "two optimizers": again,
        "two models": error_of(lambda: foreshock.attach(model, both)),
        "no module": error_of(lambda: foreshock.attach(lambda x: x, adamw(model))),  # type: ignore[arg-type]
    }


SCENARIOS: dict[str, Callable[[], Any]] = {
    "clipped": trained,
    "observed": functools.partial(trained, clip=None),
    "fused": functools.partial(
        trained, optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ),
    "accumulated": functools.partial(trained, step=accumulated_step),
    "closure": functools.partial(trained, step=closure_step),
    "checkpointed": functools.partial(trained, Checkpointed),
    "unused": functools.partial(trained, WithUnused),
    "compiled": functools.partial(trained, compiled),
    "fabric": functools.partial(trained, lambda: FabricModule(layers())),
    "compiled_fabric": functools.partial(trained, lambda: FabricModule(compiled())),
    "accelerated": functools.partial(trained, wrap=AcceleratedOptimizer),
    "lightning": functools.partial(trained, wrap=LightningOptimizer),
    "clips_by_itself": clips_by_itself,
    "skips_a_step": skips_a_step,
    "refusals": refusals,
}

if __name__ == "__main__":
    main(SCENARIOS, group=False)
