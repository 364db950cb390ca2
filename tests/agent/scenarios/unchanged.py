"""Scenarios of test_unchanged.py: each script is trained alone, and once more as `foreshock run` watches it."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from foreshock._attach import attach
from foreshock._output.leaving import present
from foreshock._run.startup import sitecustomize
from foreshock._watch import ActiveWatch
from tests.agent.scenarios.public_scripts import PUBLIC_SCRIPTS
from tests.agent.scenarios.scripts import SCRIPTS, Script
from tests.agent.scenarios.training import column, main, same, told


class Expected:
    """Norms of the gradients before each step, by optimizer in the order of their first steps."""

    def __init__(self) -> None:
        self.norms: defaultdict[int, list[float]] = defaultdict(list)
        self._held: list[torch.optim.Optimizer] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._held.append(optimizer)
        present = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [getattr(g, "full_tensor", lambda g=g: g)().double().norm() for g in present]
        scale = getattr(optimizer, "grad_scale", None)
        norm = math.sqrt(sum(float(n) ** 2 for n in norms)) / (1.0 if scale is None else float(scale))
        self.norms[id(optimizer)].append(norm)


@contextlib.contextmanager
def hooked(hook: Any) -> Iterator[None]:
    """Register a hook on all optimizers."""
    try:
        hook()
        yield
    finally:
        _global_optimizer_pre_hooks.clear()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep what a script drops, and so the watches of it: they are in cycles, and end when these are collected."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@uncollected()
def beside_alone(script: Script) -> dict[str, Any]:
    """The script alone, then as it is watched."""
    expected = Expected()
    with hooked(lambda: register_optimizer_step_pre_hook(expected)):
        alone = script()
    before = list(present())
    attach._by_script = False
    with hooked(lambda: sitecustomize._wait_for_step(torch)):
        ours = script()
    watches = [watch for watch in present() if not any(watch is each for each in before)]
    found = []
    for watch in watches:
        assert isinstance(watch, ActiveWatch)
        inside = told(watch)
        found.append(
            {
                "norms": column(inside, "global_norm"),
                "local": column(inside, "local_norm"),
                "losses": [record["loss"] for record in inside["records"]],
                "stepped": [record["stepped"] for record in inside["records"]],
                "edited": [record["edited"] for record in inside["records"]],
                "dropped": inside["dropped"],
                "enabled": watch.enabled,
                "from the script": watch is ours.watch,
            }
        )
    for watch in watches:
        watch.detach()
    weights = [p.detach().clone() for model in alone.models for p in model.parameters()]
    watched = [p.detach().clone() for model in ours.models for p in model.parameters()]
    if any(hasattr(p, "to_local") for p in weights):
        weights, watched = ([p.to_local() for p in each] for each in (weights, watched))  # type: ignore[attr-defined]
    return {
        "same": same(weights, watched),
        "same losses": alone.losses == ours.losses,
        "losses": ours.losses,
        "norms": list(expected.norms.values()),
        "norms before its changes": ours.norms,
        "watches": found,
    }


SCENARIOS: dict[str, Callable[[], Any]] = {
    name: functools.partial(beside_alone, script) for name, script in (SCRIPTS | PUBLIC_SCRIPTS).items()
}

if __name__ == "__main__":
    main(SCENARIOS)
