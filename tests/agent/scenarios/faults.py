"""Scenarios of test_faults.py: the probe fails inside, on one rank and at one step. Each rank runs it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import nn

import foreshock
from foreshock import _watch
from foreshock._arithmetic.host import HostArithmetic
from foreshock._control.apply import Apply
from foreshock._control.decide import Decide
from foreshock._measure import weights as norms_of_weights
from foreshock._measure.local import LocalNorms
from foreshock._measure.measure import Measure
from foreshock._measure.rank_sums import RankSums
from foreshock._measure.script import GradientEdits
from foreshock._output.record import Record
from foreshock._watch import ActiveWatch
from foreshock_recorder import ring
from foreshock_recorder.reader import RingReader
from tests.agent.scenarios.training import (
    STEPS,
    active,
    alike,
    apart,
    batches,
    loss_of,
    main,
    make_model,
    make_optimizer,
    ring_of,
    told,
    train,
    use,
    weights,
)

SITES: dict[str, tuple[Any, str]] = {
    "local_norms": (LocalNorms, "measure"),
    "local_summary": (HostArithmetic, "summarize"),
    "contribution": (RankSums, "contribution"),
    "end_of_backward": (GradientEdits, "backward_ended"),
    "edits": (GradientEdits, "compare"),
    "begin": (Record, "begin"),
    "norms": (Measure, "_summarize"),
    "measure": (Measure, "measure"),
    "apply": (Apply, "apply"),
    "decide": (Decide, "decide"),
    "collect": (RankSums, "collect"),
    "row": (Record, "_row"),
    "observe": (_watch, "observation_of"),
    "check": (ActiveWatch, "_check"),
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


Site = tuple[str, int, str]
"""A call of ours by ours: the caller's name and line, and the name of what it calls."""
PARTS = (str(Path(foreshock.__file__).parent), str(Path(ring.__file__).parent))
CLOSE_LOOK = 3
"""Steps from one closer look to the next, here: of the look, after it, and without, each kind comes by soon."""


ENTRIES = {
    "RankSums.issue", "ActiveWatch.before_step", "ActiveWatch.after_step", "ActiveWatch.observe", "ActiveWatch.arrived",
    "ActiveWatch.backward_began", "ActiveWatch.backward_computed", "ActiveWatch.backward_ended", "ActiveWatch.bucket",
    "ActiveWatch._run_each", "ActiveWatch._run_all", "ActiveWatch.prepare_sum", "BackwardHooks.bucket",
    "HookState.average", "ShardSums.issue", "Measure.measure_at_end",
    "ActiveWatch._confirm_edit",
}  # fmt: skip
"""Methods that are entered before any guard, or have one of their own: to enter a method cannot fail, and an average
or a collective is training itself. All that they call in their turn is among the sites."""
RARE = {"RankSums._buffer", "_reduced"}
"""Only where a sum is four steps behind: sums.py is about that. Only where a reduction is over before its callback is
set: else another thread calls it."""


def site_of(frame: FrameType, event: str) -> Site | None:
    caller, callee = frame.f_back, frame.f_code.co_qualname
    if event != "call" or caller is None or not frame.f_code.co_filename.startswith(PARTS):
        return None
    name = caller.f_code.co_qualname
    # What torch calls are the hooks themselves; the guard cannot guard itself, but all that it runs.
    if not caller.f_code.co_filename.startswith(PARTS) or "Guard." in callee or callee in ENTRIES | RARE:
        return None
    # Whoever is at work when garbage is collected did not call its finalizer.
    if callee.endswith(".__del__"):
        return None
    # A generator that another function enters is being thrown away.
    if "<genexpr>" in callee and not callee.startswith(name):
        return None
    return name, caller.f_lineno, callee


class Beside:
    """A watched training, step by step beside a stock one that it starts each step from."""

    def __init__(self, *, fused: bool, clip: Any, name: str, logs: bool = False) -> None:
        """logs: the script of ours multiplies gradients by 1, to log their norm."""
        self._logs = logs
        self.stock, self.ours = make_model(), make_model()
        # Without momentum there is no state but the weights.
        self._stock_optimizer = make_optimizer(self.stock, "SGD", fused=fused)
        self._optimizer = make_optimizer(self.ours, "SGD", fused=fused)
        self.watch = active(foreshock.attach(self.ours, self._optimizer, clip=clip, skip=fused, run=name))
        self._data, self._copy = batches(), batches()
        self.steps = 0

    def step(self, profile: Any = None) -> tuple[float, float]:
        """How far ours is from stock, and from rank 0. profile: on ours alone."""
        self.stock.zero_grad()
        loss_of(self.stock, self._data).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.stock.parameters(), 0.5)
        self._stock_optimizer.step()
        self.ours.zero_grad()
        loss = loss_of(self.ours, self._copy)
        sys.setprofile(profile)
        self.watch.observe(loss=loss, step=self.steps)
        loss.backward()  # type: ignore[no-untyped-call]
        sys.setprofile(None)
        # So that each step finds the sum of its own, and takes it.
        while self.watch.sums is not None and self.watch.sums.under_way():
            time.sleep(0.0005)
        if self._logs:
            nn.utils.clip_grad_norm_(self.ours.parameters(), math.inf)
        sys.setprofile(profile)
        self._optimizer.step()
        sys.setprofile(None)
        self.steps += 1
        stock, ours = weights(self.stock), weights(self.ours)
        self.ours.load_state_dict(self.stock.state_dict())
        return apart(stock, ours), alike(ours)


def everywhere_fused() -> dict[str, Any]:
    return _everywhere("fused", fused=True, clip=0.5)


def everywhere_unfused() -> dict[str, Any]:
    return _everywhere("unfused", fused=False, clip=0.5)


def everywhere_adaptive() -> dict[str, Any]:
    """Clipped by a history of its own on each rank: no stock training does that."""
    return _everywhere("adaptive", fused=True, clip=foreshock.AdaptiveClip(max_norm=0.5))


def everywhere_kernels() -> dict[str, Any]:
    use("kernels")
    try:
        return _everywhere("kernels", fused=True, clip=foreshock.AdaptiveClip(max_norm=0.5))
    finally:
        use("host")


def where_norms_are_logged() -> dict[str, Any]:
    """What finds out, alike on all ranks, that the script has not changed its gradients."""
    callers = {
        "ActiveWatch.backward_ended", "ActiveWatch._confirm_edit", "Measure.measure_at_end", "Measure.confirms_edit",
        "Measure.averaged", "Measure._summarize",
    }  # fmt: skip
    return _everywhere("logged", fused=False, clip=0.5, callers=callers)


def dropped(watch: ActiveWatch) -> int:
    with ring_of(watch) as path:
        return sum(RingReader(path).dropped.values())


def _everywhere(name: str, *, fused: bool, clip: Any, callers: Collection[str] = ()) -> dict[str, Any]:
    """Each call of ours by ours that a step makes fails once, on rank 1: in a training that goes on, or, if it comes
    only in the beginning, in one of its own. callers: whose calls fail, in a script that logs norms; empty: all.
    """
    norms_of_weights.EVERY_STEPS = norms_of_weights.NORMS_EVERY_STEPS_IF_SMALL = CLOSE_LOOK
    run = f"everywhere_{name}"
    pair = Beside(fused=fused, clip=clip, name=run, logs=bool(callers))
    sites: dict[Site, None] = {}

    def find(frame: FrameType, event: str, _: Any) -> None:
        site = site_of(frame, event)
        if site is not None and (not callers or site[0] in callers):
            sites[site] = None

    for _ in range(2 * CLOSE_LOOK):
        pair.step(find)
    wrong: list[str] = []

    def fails(site: Site, pair: Beside) -> bool:
        """Whether it could be made to."""
        fired = False

        def fail(frame: FrameType, event: str, _: Any) -> None:
            nonlocal fired
            if not fired and site_of(frame, event) == site:
                fired = True
                raise KeyError("a bug of ours")

        before = dropped(pair.watch)
        far = [pair.step(fail if dist.get_rank() == 1 and not fired else None) for _ in range(CLOSE_LOOK)]
        drops = dropped(pair.watch) - before
        from_stock, from_rank_0 = (max(f) for f in zip(*far, strict=True))
        if (clip == 0.5 and from_stock > 1e-5) or from_rank_0 > 1e-6 or drops != int(fired):
            wrong.append(f"{site}: {from_stock:.2g} from stock, {from_rank_0:.2g} from rank 0, {drops} drops")
        return fired

    late = [site for site in of_rank_1(list(sites)) if not fails(site, pair)]
    # What ranks have learned is what they decide by.
    learned: list[Any] = [None, None]
    dist.all_gather_object(learned, what_is_learned(pair.watch))
    pair.watch.detach()
    runs, never = {run: len(sites) - len(late)}, []
    # The beginning is the same for all of them.
    if late := of_rank_1(late if name == "fused" else []):
        runs[f"{run}_late"] = len(late)
    for site in late:
        pair = Beside(fused=fused, clip=clip, name=f"{run}_late")
        never += [] if fails(site, pair) else [site]
        pair.watch.detach()
    called = sorted({callee for _, _, callee in sites})
    return {"runs": runs, "never": never, "wrong": wrong, "learned": learned, "called": called}


def what_is_learned(watch: ActiveWatch) -> list[float] | None:
    """The history's numbers and the learning rate; None where no rule needs them."""
    decide: Any = watch._decide
    if (history := decide.memory.history) is None:
        return None
    numbers, rates = history
    return [*map(float, numbers), *rates]


def of_rank_1(sites: list[Site]) -> list[Site]:
    """So that both ranks take as many steps."""
    chosen = [sites]
    dist.broadcast_object_list(chosen, src=1)
    return chosen[0]


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
    scenarios: dict[str, Callable[[], Any]] = {
        "plain": plain, "everywhere_fused": everywhere_fused, "everywhere_unfused": everywhere_unfused,
        "everywhere_adaptive": everywhere_adaptive, "everywhere_kernels": everywhere_kernels,
        "everywhere_logged": where_norms_are_logged,
    }  # fmt: skip
    for each in SITES:
        for fused in (True, False):
            scenarios[case(each, fused=fused)] = _scenario(each, fused=fused)
    main(scenarios)
    sys.exit("not reached")
