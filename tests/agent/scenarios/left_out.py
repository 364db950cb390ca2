"""Scenarios of test_left_out.py: steps that a script observes or measures, and then leaves out. Each rank runs it."""

from __future__ import annotations

import math
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import foreshock
from tests.agent.scenarios.training import active, batches, loss_of, main, make_model, make_optimizer, told, told_in

STEPS, BAD = 9, 5


def records(watch: foreshock.Watch) -> list[dict[str, Any]]:
    found = told(watch)
    assert found["dropped"] == {}, found
    kept = ("global_norm", "local_norm", "local_nan_parameters", "global_nan_parameters", "loss_scale")
    return [
        {name: record[name] for name in ("step", "loss", "stepped", "unknown")}
        | {name: record["measured"][name] for name in kept}
        for record in found["records"]
    ]


def lost(step: int, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan if step == BAD else loss


def everywhere(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total)


def continues_before_backward(only: int | None = None) -> list[dict[str, Any]]:
    """only: the one rank that observes."""
    model = make_model()
    optimizer, data = make_optimizer(model), batches()
    with foreshock.attach(model, optimizer, clip=1.0) as watch:
        for step in range(STEPS):
            loss = loss_of(model, data)
            # One rank's batch is bad.
            loss = lost(step, loss) if dist.get_rank() == 1 else loss
            if only in (None, dist.get_rank()):
                watch.observe(loss=loss, step=step)
            if not math.isfinite(everywhere(loss)):
                continue
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            # What tells that all observe comes with the ranks' sums.
            while (sums := active(watch).sums) is not None and sums.under_way():
                pass
        return records(watch)


def continues_and_only_rank_0_observes() -> list[dict[str, Any]]:
    return continues_before_backward(only=0)


def continues_before_step(*, set_to_none: bool = True, observes: bool = True, **ddp: Any) -> list[dict[str, Any]]:
    """Two bad ones: what they were is known of the second only."""
    model = make_model(**ddp)
    optimizer, data = make_optimizer(model), batches()
    with foreshock.attach(model, optimizer, clip=1.0) as watch:
        for step in range(STEPS):
            loss = loss_of(model, data)
            loss = loss * math.nan if step in (BAD, BAD + 2) and dist.get_rank() == 1 else loss
            if observes:
                watch.observe(loss=loss, step=step)
            optimizer.zero_grad(set_to_none=set_to_none)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not math.isfinite(sum(float(g.sum()) for g in gradients)):
                continue
            optimizer.step()
        return records(watch)


def continues_before_step_and_zeroes() -> list[dict[str, Any]]:
    return continues_before_step(set_to_none=False)


def continues_before_step_with_bucket_views() -> list[dict[str, Any]]:
    return continues_before_step(gradient_as_bucket_view=True)


def continues_before_step_and_never_observes() -> list[dict[str, Any]]:
    return continues_before_step(observes=False)


def accumulates(*, observes: bool, **ddp: Any) -> list[dict[str, Any]]:
    """Three backward passes a step, each of which averages."""
    model = make_model(**ddp)
    optimizer, data = make_optimizer(model), batches()
    with foreshock.attach(model, optimizer, clip=1.0) as watch:
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for _ in range(3):
                loss = loss_of(model, data)
                if observes:
                    watch.observe(loss=loss, step=step)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return records(watch)


def accumulates_and_observes_each() -> list[dict[str, Any]]:
    return accumulates(observes=True)


def accumulates_without_a_word() -> list[dict[str, Any]]:
    return accumulates(observes=False)


def accumulates_in_bucket_views() -> list[dict[str, Any]]:
    return accumulates(observes=True, gradient_as_bucket_view=True)


def _scaler(*, what: str, when: str) -> list[dict[str, Any]]:
    """An unfused optimizer: the scaler does not call it where it leaves a step out."""
    torch.manual_seed(dist.get_rank())
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 if what == "inf" else 3e38, growth_interval=10**6)
    with foreshock.attach(model, optimizer, clip=1.0) as watch:
        for step in range(30):
            x = torch.randn(16, 8)
            loss = (model(x) - 9 * x.sum(1, keepdim=True)).square().mean()
            if step == 20:
                loss = loss * float(what)
            if when == "before":
                watch.observe(loss=loss, step=step)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if when == "between":
                watch.observe(loss=loss, step=step)
            scaler.step(optimizer)
            scaler.update()
            if when == "after":
                watch.observe(loss=loss, step=step)
            while (sums := active(watch).sums) is not None and sums.under_way():
                pass
        return [record | {"script's": step} for step, record in enumerate(records(watch))]


def scaler_nan_before() -> list[dict[str, Any]]:
    return _scaler(what="nan", when="before")


def scaler_nan_between() -> list[dict[str, Any]]:
    return _scaler(what="nan", when="between")


def scaler_nan_after() -> list[dict[str, Any]]:
    return _scaler(what="nan", when="after")


def scaler_inf_before() -> list[dict[str, Any]]:
    return _scaler(what="inf", when="before")


def scaler_inf_after() -> list[dict[str, Any]]:
    return _scaler(what="inf", when="after")


def ends_with_what_was_told() -> dict[str, Any]:
    """The last things of a run that breaks off at a NaN: told, or measured."""
    found = {}
    for what in ("told", "measured", "clipped", "raised"):
        model = make_model()
        optimizer, data = make_optimizer(model), batches()
        watch = foreshock.attach(model, optimizer)
        for step in range(3):
            loss = loss_of(model, data)
            if step == 2:
                loss = loss * math.nan
            watch.observe(loss=loss, step=step)
            if step == 2 and what == "told":
                break
            optimizer.zero_grad()
            if what == "raised" and step == 2:
                model.module[0].weight.register_hook(_raise)
                try:
                    loss.backward()  # type: ignore[no-untyped-call]
                except ArithmeticError:
                    break
            loss.backward()  # type: ignore[no-untyped-call]
            if step == 2:
                if what == "clipped":
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                break
            optimizer.step()
        ring = active(watch)._record.ring.path
        watch.detach()
        found[what] = records_in(ring)
    return found


def _raise(_: torch.Tensor) -> None:
    raise ArithmeticError("a hook of the script's")


def records_in(ring: Any) -> list[dict[str, Any]]:
    return [
        {name: record[name] for name in ("step", "loss", "stepped", "unknown")}
        | {"global_norm": record["measured"]["global_norm"]}
        for record in told_in(ring)["records"]
    ]


class SAM(torch.optim.Optimizer):
    """As its public implementations have it: first_step, second_step, and never step."""

    def __init__(self, parameters: Any, base: Any, **options: Any) -> None:
        super().__init__(parameters, options)
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(0.05 * p.grad)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(0.05 * p.grad)
        self.base.step()


def an_optimizer_that_never_steps() -> list[dict[str, Any]]:
    model = make_model()
    optimizer, data = SAM(model.parameters(), torch.optim.SGD, lr=0.01), batches()
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        for step in range(6):
            for part in (optimizer.first_step, optimizer.second_step):
                model.zero_grad()
                loss_of(model, data).backward()  # type: ignore[no-untyped-call]
                part()
            watch.observe(step=step)
        return records(watch)


def another_optimizer_steps() -> list[dict[str, Any]]:
    model = make_model()
    optimizer, data = make_optimizer(model), batches()
    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        optimizer = make_optimizer(model)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return records(watch)


def gan() -> dict[str, Any]:
    """Two models, one process; the generator's backward passes through the discriminator, and its gradients go."""
    torch.manual_seed(0)
    wrap = nn.parallel.DistributedDataParallel
    g, d = wrap(nn.Linear(4, 8)), wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    og, od = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    wg, wd = foreshock.attach(g, og, run="gan-g"), foreshock.attach(d, od, run="gan-d")
    for step in range(8):
        # The discriminator may make several steps before the generator's first.
        for part in range(3):
            od.zero_grad()
            real, fake = d(torch.randn(8, 8)), d(g(torch.randn(8, 4)).detach())
            loss = fake.mean() - real.mean()
            loss.backward()
            od.step()
            wd.observe(loss=loss, step=3 * step + part)
        og.zero_grad()
        loss = -d(g(torch.randn(8, 4))).mean()
        loss.backward()
        og.step()
        wg.observe(loss=loss, step=step)
    found = {"enabled": [wg.enabled, wd.enabled], "g": records(wg), "d": records(wd)}
    wg.detach()
    wd.detach()
    return found


def dropped_by_zero_grad() -> list[int]:
    """How many gradients of a step outlive `zero_grad`, for several optimizers and settings."""
    left = []
    for fused, settings in ((True, {"clip": 0.5}), (False, {"clip": 0.5}), (True, {"clip": None})):
        model = make_model()
        optimizer = make_optimizer(model, fused=fused)
        with foreshock.attach(model, optimizer, **settings):
            data = batches()
            for _ in range(3):
                loss_of(model, data).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                seen = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
                optimizer.zero_grad()
                left.append(sum(each() is not None for each in seen))
    return left


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
