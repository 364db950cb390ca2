"""Scenarios of test_faults.py: the probe fails inside, on one rank and at one step. Run by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

import foreshock
from foreshock import _averaged, _local
from foreshock._averaged import AveragedGradient
from foreshock._edits import GradientEdits
from foreshock._kernel import Kernel
from foreshock._local import RankSums
from foreshock._policies import Policies
from foreshock._records import Records
from foreshock._watch import ActiveWatch
from tests.agent.training import STEPS, alike, apart, main, make_model, make_optimizer, told, train

SITES: dict[str, tuple[Any, str]] = {
    "bucket": (_local, "gradient_norms"),
    "last_bucket": (_local, "summarize"),
    "contribution": (RankSums, "contribution"),
    "end_of_backward": (GradientEdits, "backward_ended"),
    "edits": (GradientEdits, "before_step"),
    "launch": (Records, "launch"),
    "norms": (_averaged, "gradient_norms"),
    "summary": (AveragedGradient, "measure"),
    "clip": (Kernel, "follow"),
    "rule": (Policies, "rule"),
    "collect": (RankSums, "collect"),
    "row": (ActiveWatch, "_write_row"),
    "observe": (ActiveWatch, "_as_number"),
    "hook_order": (ActiveWatch, "_check_hook_order"),
}
"""Call sites, one for each guard of the path of a step and more."""
FAILING = 3


def case(site: str, *, fused: bool) -> str:
    return f"{site}_{'fused' if fused else 'unfused'}"


def fails_at(site: str, *, fused: bool) -> dict[str, Any]:
    kind, name = SITES[site]
    whole = getattr(kind, name)
    now, fired = 0, False

    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal fired
        if now == FAILING and not fired:
            fired = True
            raise KeyError("a bug of ours")
        return whole(*arguments, **options)

    def count(step: int, loss: Any) -> None:
        nonlocal now
        now = step
        watch.observe(loss=loss)

    model = make_model()
    optimizer = make_optimizer(model, fused=fused)
    stock = train(model, optimizer, before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    ours = make_model()
    optimizer = make_optimizer(ours, fused=fused)
    if dist.get_rank() == 1:
        setattr(kind, name, broken)
    try:
        with foreshock.attach(ours, optimizer, clip=0.5, run=case(site, fused=fused)) as watch:
            weights = train(ours, optimizer, before_backward=count)
            found = told(watch)
    finally:
        setattr(kind, name, whole)
    return {
        "fired": fired,
        "apart": apart(stock, weights),
        "alike": alike(weights),
        "dropped": found["dropped"],
        "note": found["note"],
        "steps": [record["step"] for record in found["records"]],
        "measured": [record["step"] for record in found["records"] if record["measured"] is not None],
        "local": {r["step"]: r["measured"]["local_norm"] for r in found["records"] if r["measured"] is not None},
    }


def _scenario(site: str, *, fused: bool) -> Callable[[], dict[str, Any]]:
    return lambda: fails_at(site, fused=fused)


def plain() -> list[int]:
    """Nothing special: to see what is said."""
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        train(model, optimizer, before_backward=lambda _, loss: watch.observe(loss=loss))
        found = told(watch)
    assert len(found["records"]) == STEPS
    return [record["measured"]["reduced_sequence"] for record in found["records"]]


if __name__ == "__main__":
    scenarios: dict[str, Callable[[], Any]] = {"plain": plain}
    for each in SITES:
        for fused in (True, False):
            scenarios[case(each, fused=fused)] = _scenario(each, fused=fused)
    main(scenarios)
    sys.exit("not reached")
