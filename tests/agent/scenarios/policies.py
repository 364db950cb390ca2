"""Scenarios of test_policies.py: adaptive clipping, steps left out, dry runs. Each rank runs it."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock._output.recorder_process import RecorderProcess
from foreshock_collector.analysis import rules
from foreshock_collector.analysis.detection import Detector
from foreshock_recorder.layout import NormHistory
from tests.agent.scenarios.training import (
    alike,
    apart,
    batches,
    error_of,
    loss_of,
    main,
    make_model,
    same,
    told,
    weights,
)

RULE = rules.DEFAULT.gradient
Factors = dict[int, float]
"""Of the loss, by step."""


def make(kind: str, model: nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    more = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, fused=fused, **more)
    return optimizer


def train(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    factors: Factors,
    *,
    do_step: Callable[[int], bool] = lambda _: True,
    after_step: Callable[[], Any] = lambda: None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    data = batches()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data) * factors.get(step, 1.0)
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        if do_step(step):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        after_step()
    return weights(model)


def column(found: dict[str, Any], name: str) -> list[Any]:
    return [record["measured"][name] for record in found["records"]]


def norm_of(model: nn.Module) -> float:
    return float(
        torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum() ** 0.5
    )


def adaptive_fused() -> dict[str, Any]:
    return _adaptive(fused=True)


def adaptive_unfused() -> dict[str, Any]:
    return _adaptive(fused=False)


def _adaptive(*, fused: bool) -> dict[str, Any]:
    """Beside a training that clips by hand to what the collector's own rule allows."""
    steps, factors, max_norm = 60, {3: 12.0, 45: 30.0, 46: 12.0, 55: 30.0}, 40.0
    model = make_model()
    optimizer, detector = make("AdamW", model, fused=fused), Detector()
    limits = []

    def clip_by_hand(step: int) -> bool:
        band = detector.gradient.band(RULE)
        limits.append(min(max_norm, math.inf if band is None else band[1]))
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), limits[-1]))
        detector.update(attempt=0, sequence=step + 1, step=step, norm=norm, loss=None, rate=0.01)
        return True

    by_hand = train(model, optimizer, steps, factors, do_step=clip_by_hand)
    model = make_model()
    optimizer = make("AdamW", model, fused=fused)
    with foreshock.attach(model, optimizer, clip=foreshock.AdaptiveClip(max_norm=max_norm)) as watch:
        ours = train(model, optimizer, steps, factors)
        found = told(watch)
    return {
        "apart": apart(by_hand, ours),
        "alike": alike(ours),
        "limits": limits,
        "norms": column(found, "global_norm"),
        "coefficients": column(found, "clip_coefficient"),
        "dropped": found["dropped"],
    }


def resumed() -> dict[str, Any]:
    """A job that stops after 30 steps and resumes with a new watch, beside one that goes on."""

    def run(state_of: Callable[[foreshock.Watch], Any] | None) -> list[Tensor]:
        model = make_model()
        optimizer, count = make("AdamW", model), itertools.count(1)
        options: dict[str, Any] = {"clip": foreshock.AdaptiveClip(), "skip": True}
        watch = foreshock.attach(model, optimizer, **options)

        def checkpoint() -> None:
            nonlocal watch
            if next(count) == 30 and state_of is not None:
                state = json.loads(json.dumps(state_of(watch)))
                watch.detach()
                watch = foreshock.attach(model, optimizer, **options)
                watch.load_state_dict(state)

        ours = train(model, optimizer, 40, {33: 1000.0, 36: 12.0}, after_step=checkpoint)
        watch.detach()
        return ours

    goes_on = run(None)
    model = make_model()
    with foreshock.attach(model, make("AdamW", model), clip=1.0) as watch:
        without_history = watch.state_dict()
        refused = error_of(lambda: watch.load_state_dict({"mean": 1.0}))
    return {
        "as one": same(goes_on, run(lambda watch: watch.state_dict())),
        "as one without history": same(goes_on, run(lambda _: {})),
        "without history": without_history,
        "ignored": refused,
    }


def inherited() -> dict[str, Any]:
    """A job that resumes by what the collector answers rank 0, beside one that goes on."""
    asked = 0

    def answering(history: NormHistory | None) -> Any:
        def wait(*_: object) -> NormHistory | None:
            nonlocal asked
            asked += 1
            return history

        return mock.patch.object(RecorderProcess, "wait_for_history", wait)

    def run(answer: Callable[[NormHistory], NormHistory | None] | None) -> list[Tensor]:
        model = make_model()
        optimizer, count = make("AdamW", model), itertools.count(1)
        options: dict[str, Any] = {"clip": foreshock.AdaptiveClip(), "skip": True}
        watch = foreshock.attach(model, optimizer, **options)

        def restart() -> None:
            nonlocal watch
            if next(count) == 30 and answer is not None:
                known = watch.state_dict()
                watch.detach()
                numbers = [known[name] or 0.0 for name in ("mean", "recent", "deviation", "count", "learning_rate")]
                with answering(answer(NormHistory(*numbers))):
                    watch = foreshock.attach(model, optimizer, **options)

        ours = train(model, optimizer, 40, {33: 1000.0, 36: 12.0}, after_step=restart)
        watch.detach()
        return ours

    def known_at_attach(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> float | None:
        model = make_model()
        optimizer = optimizer_of(model)
        with answering(NormHistory(0.0, 0.0, 0.1, 100, 0.01)), foreshock.attach(model, optimizer, skip=True) as watch:
            return watch.state_dict()["count"]

    def on_rank_0_only(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make("AdamW", model)
        if dist.get_rank() == 0:
            optimizer.load_state_dict(trained)
        return optimizer

    goes_on = run(None)
    found = {
        "as one": same(goes_on, run(lambda known: known)),
        "as one without an answer": same(goes_on, run(lambda _: None)),
        "as one without a history": same(goes_on, run(lambda known: known._replace(steps=0))),
        "as one with nonsense": same(goes_on, run(lambda known: known._replace(mean=math.nan))),
        "asked": asked,
    }
    model = make_model()
    optimizer = make("AdamW", model)
    train(model, optimizer, 2, {})
    trained = optimizer.state_dict()
    return found | {
        "new": [known_at_attach(partial(make, kind)) for kind in ("AdamW", "Adagrad")],
        "resumed on one rank": known_at_attach(on_rank_0_only),
        "asked in the end": asked,
    }


def _skipping(kind: str, factors: Factors, skipped: set[int], steps: int, **attach: Any) -> dict[str, Any]:
    """Beside a training that does not call the optimizer for these steps."""
    model = make_model()
    stock = train(model, make(kind, model), steps, factors, do_step=lambda step: step not in skipped)
    model = make_model()
    optimizer = make(kind, model)
    tripped: list[bool] = []
    with foreshock.attach(model, optimizer, skip=True, **attach) as watch:
        ours = train(model, optimizer, steps, factors, after_step=lambda: tripped.append(watch.tripped))
        found = told(watch)
    return {
        "as stock": same(stock, ours),
        "finite": all(bool(w.isfinite().all()) for w in ours),
        "skipped": [step for step, flag in enumerate(column(found, "skipped")) if flag],
        "kinds": sorted(set(column(found, "skipped"))),
        "tripped": tripped,
        "counters": sorted({float(s["step"]) for s in optimizer.state.values() if "step" in s}),
        "left": [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")],
        "dropped": found["dropped"],
    }


NAN_STEPS = {0, 4, 5}


def nan_adamw() -> dict[str, Any]:
    return _skipping("AdamW", dict.fromkeys(NAN_STEPS, math.nan), NAN_STEPS, 9)


def nan_sgd_momentum() -> dict[str, Any]:
    return _skipping("SGD", dict.fromkeys(NAN_STEPS, math.nan), NAN_STEPS, 9)


def nan_adagrad() -> dict[str, Any]:
    return _skipping("Adagrad", dict.fromkeys(NAN_STEPS, math.inf), NAN_STEPS, 9)


def far_beyond_history() -> dict[str, Any]:
    return _skipping("AdamW", {30: 5.0, 33: 1000.0, 36: 1000.0}, {33, 36}, 40)


def early_and_high() -> dict[str, Any]:
    """Without history nothing is far beyond it."""
    return _skipping("AdamW", {5: 1000.0}, set(), 8)


def budget_spent() -> dict[str, Any]:
    """Spikes of the same height, five of them left out; the sixth is not."""
    spikes = [30, 33, 36, 39, 42, 45]
    return _skipping("AdamW", dict.fromkeys(spikes, 1000.0), set(spikes[:5]), 60)


def nan_for_good() -> dict[str, Any]:
    return _skipping("AdamW", dict.fromkeys(range(3, 99), math.nan), {3, 4, 5}, 20)


def skip_and_clip() -> dict[str, Any]:
    """Both at once, with a divisor of exactly 1 on every finite step."""
    return _skipping("AdamW", dict.fromkeys(NAN_STEPS, math.nan), NAN_STEPS, 9, clip=1e6)


def own_clip_and_skip() -> dict[str, Any]:
    """The script clips, Foreshock leaves out."""

    def run(*, watched: bool) -> tuple[list[Tensor], list[float]]:
        model = make_model()
        optimizer = make("AdamW", model)
        watch = foreshock.attach(model, optimizer, skip=True) if watched else foreshock.Watch()

        def clip(step: int) -> bool:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return watched or step != 4

        with watch:
            trained = train(model, optimizer, 8, {4: math.nan}, do_step=clip)
            return trained, column(told(watch), "skipped") if watched else []

    (stock, _), (ours, skipped) = run(watched=False), run(watched=True)
    return {"as stock": same(stock, ours), "skipped": skipped}


def scaled_and_skipped() -> dict[str, Any]:
    """Overflows are the scaler's, and cost no budget; a spike is ours, and leaves the scale alone."""
    factors = {**dict.fromkeys(range(2, 9), math.inf), 40: 1000.0}

    def run(*, watched: bool) -> tuple[list[Tensor], dict[str, Any], float, list[bool]]:
        model = make_model()
        optimizer = make("AdamW", model)
        watch = foreshock.attach(model, optimizer, skip=True) if watched else foreshock.Watch()
        scaler, tripped = torch.amp.GradScaler("cpu", init_scale=2.0**20), []
        with watch:
            trained = train(
                model, optimizer, 60, factors, scaler=scaler,
                do_step=lambda step: watched or step != 40, after_step=lambda: tripped.append(watch.tripped),
            )  # fmt: skip
            return trained, told(watch) if watched else {}, scaler.get_scale(), tripped

    stock, _, stock_scale, _ = run(watched=False)
    ours, found, scale, tripped = run(watched=True)
    return {
        "apart": apart(stock, ours),
        "scales": [stock_scale, scale],
        "skipped": [step for step, flag in enumerate(column(found, "skipped")) if flag],
        "tripped": any(tripped),
        "dropped": found["dropped"],
    }


def dry_run_of_all() -> dict[str, Any]:
    """Neither clipped nor left out, and with an optimizer that could not leave anything out."""
    factors = {30: 1000.0, 33: 1000.0, 36: math.nan}
    found = {}
    for name, clip in (
        ("norm", 0.5),
        ("adaptive", foreshock.AdaptiveClip()),
        ("value", foreshock.ValueClip(clip_value=0.05)),
    ):
        model = make_model()
        stock = train(model, make("AdamW", model, fused=False), 36, factors)
        model = make_model()
        optimizer = make("AdamW", model, fused=False)
        with foreshock.attach(model, optimizer, clip=clip, skip=True, dry_run=True) as watch:
            ours = train(model, optimizer, 36, factors)
            seen = told(watch)
            counts = watch.dry_run_counts()
        found[name] = {
            "as stock": same(stock, ours),
            "counts": counts,
            "shadow": column(seen, "shadow"),
            "quiet": set(column(seen, "skipped")) == {0.0} and set(column(seen, "clip_coefficient")) == {1.0},
            "norms": column(seen, "global_norm"),
            "dropped": seen["dropped"],
        }
    return found


def scaled_value_clip() -> dict[str, Any]:
    """By value under a scaler that leaves it to the kernel to unscale."""

    def run(*, watched: bool) -> list[Tensor]:
        model = make_model()
        optimizer = make("AdamW", model)
        clip = foreshock.ValueClip(clip_value=0.05)
        watch = foreshock.attach(model, optimizer, clip=clip) if watched else foreshock.Watch()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def clip_by_hand(_: int) -> bool:
            if not watched:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            return True

        with watch:
            return train(model, optimizer, 8, {3: math.inf}, do_step=clip_by_hand, scaler=scaler)

    return {"apart": apart(run(watched=False), run(watched=True))}


def refusals() -> dict[str, Any]:
    model = make_model()
    dampened = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    experiment = "other" if dist.get_rank() else None
    return {
        "not fused": error_of(lambda: foreshock.attach(model, make("AdamW", model, fused=False), skip=True)),
        "no fused path": error_of(lambda: foreshock.attach(model, torch.optim.NAdam(model.parameters()), skip=True)),
        "dampening": error_of(lambda: foreshock.attach(model, dampened, skip=True)),
        "nothing to try": error_of(lambda: foreshock.attach(model, make("SGD", model), dry_run=True)),
        "skip on rank 1 alone": error_of(
            lambda: foreshock.attach(model, make("SGD", model), skip=bool(dist.get_rank()))
        ),
        "another experiment on rank 1": error_of(
            lambda: foreshock.attach(model, make("SGD", model), experiment=experiment)
        ),
    }


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
