"""Times and profiles the training steps of several variants side by side, for `benchmarks.gpu`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

import foreshock
from benchmarks.gpu_models import MODELS, Training, monitor_by_hand
from benchmarks.gpu_profile import Profile, profile_steps
from foreshock._attach.ranks import Ranks

VARIANTS = (
    "plain",
    "stock_clip",
    "item_monitor",
    "observe",
    "foreshock_clip",
    "foreshock_clip_global_only",
    "observe_several",
    "foreshock_clip_several",
    "foreshock_adaptive_skip_several",
)
BUCKETS = ("copies", "views")
"""Gradients are copied into DDP's buckets, its default, or are views of them (`gradient_as_bucket_view=True`)."""
MAX_NORM = 1e-3
"""Every step is clipped: that takes the longest."""
WARM_UP_STEPS = 8
"""DDP rebuilds its buckets in the second step, and kernels are compiled in the first."""
SECONDS_PER_VISIT = 0.03
"""As many steps at a time as fill this: a synchronization before and after costs some twenty microseconds."""
MOST_STEPS_PER_VISIT = 20
PROFILED_STEPS = 5
MEMORY_SHARE = 0.8
COPY_BYTES = 2**32


Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Costs of one variant of one model: a row of the table."""

    model: str
    parameters: int
    buckets: str
    variant: str
    ratio_to_stock_clip: float
    """Median over rounds of the time of a step, divided by that of `stock_clip` in the same round."""
    ratio_low: float
    """Lower end of its 95 % confidence interval."""
    ratio_high: float
    step_ms: float
    """Median over rounds, the device included."""
    host_ms: float
    """Median time until the host has launched one step, from an idle device."""
    host_ms_low: float
    host_ms_high: float
    rounds: int
    kernels: bool
    """Whether Triton's kernels have decided its steps."""
    profile: Profile | None
    """Of one step; None without a card."""
    gradient_passes: float | None
    """Time on the device beyond `plain`, in times that a copy takes to read all gradients once."""


def local_norms_of(kind: str) -> bool:
    """Return whether a variant measures each rank's own gradient."""
    return kind != "foreshock_clip_global_only"


def decided_by_kernels(watch: foreshock.Watch | None) -> bool:
    """Return whether Triton's kernels decide the steps of a variant."""
    return type(getattr(watch, "_measure", None)).__name__ == "KernelMeasure"


def variant_step(name: str, model: str, device: torch.device, *, views: bool) -> tuple[Training, Step]:
    """Build a variant; the function takes one of its training steps."""
    training = MODELS[model].training(device, views=views)
    ddp, optimizer = training.model, training.optimizer
    kind = name.removesuffix("_several")
    watch: foreshock.Watch | None = None
    path: AbstractContextManager[None] = several_ranks() if kind != name else nullcontext()
    with path:
        if kind == "observe":
            watch = foreshock.attach(ddp, optimizer, run=name)
        elif kind == "foreshock_adaptive_skip":
            clip = foreshock.AdaptiveClip(max_norm=MAX_NORM)
            watch = foreshock.attach(ddp, optimizer, run=name, clip=clip, skip=True)
        elif kind.startswith("foreshock_clip"):
            watch = foreshock.attach(ddp, optimizer, run=name, clip=MAX_NORM, local_norms=local_norms_of(kind))
    if watch is not None and local_norms_of(kind):
        # Else the cost of one path would be taken for that of the other.
        assert (getattr(watch, "sums", None) is not None) == (kind != name), name
    training.watch = watch

    def step() -> None:
        # Gradients that are views stay where they are.
        optimizer.zero_grad(set_to_none=not views)
        loss = training.loss()
        if watch is not None:
            watch.observe(loss=loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        if kind == "stock_clip":
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), MAX_NORM)
        elif kind == "item_monitor":
            monitor_by_hand(ddp, MAX_NORM)
        optimizer.step()

    return training, step


@contextmanager
def several_ranks() -> Iterator[None]:
    """Let an attach take the path of several ranks where there is one: local norms, and the small sum over ranks.

    NCCL refuses two ranks on one card. Once the ranks, all one of them, have agreed, their group claims to have two.
    """
    agree = Ranks.agree
    with ExitStack() as stack:

        def agree_and_grow(*arguments: Any, **options: Any) -> Any:
            decision = agree(*arguments, **options)
            stack.enter_context(patch.object(dist.ProcessGroup, "size", lambda _: 2))
            return decision

        stack.enter_context(patch.object(Ranks, "agree", agree_and_grow))
        yield


def steps_per_visit(seconds: float) -> int:
    """Return how many steps to time at once, given the time of one."""
    return max(1, min(MOST_STEPS_PER_VISIT, round(SECONDS_PER_VISIT / seconds)))


def time_variants(
    steps: dict[str, Step], rounds: int, synchronize: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time all variants in turn: seconds of a step by round, [rounds] for each, and of the host's part of one."""
    random = np.random.default_rng(0)
    order = list(steps)

    def seconds(step: Step, count: int, *, host: bool = False) -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            step()
        if host:
            launched = time.perf_counter()
            synchronize()
            return launched - began
        synchronize()
        return (time.perf_counter() - began) / count

    for step in steps.values():
        seconds(step, WARM_UP_STEPS)
    # As many for all: the lengths of two loops that are compared must not differ.
    count = steps_per_visit(statistics.median(seconds(step, 3) for step in steps.values()))
    whole: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            whole[name].append(seconds(steps[name], count))
        random.shuffle(order)
        for name in order:
            host[name].append(seconds(steps[name], 1, host=True))
    return whole, host


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, by the percentile bootstrap over rounds. values: [rounds]."""
    random = np.random.default_rng(0)
    sample = np.asarray(values, dtype=np.float64)
    draws = random.choice(sample, size=(4000, len(sample)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def results_of(
    whole: dict[str, list[float]],
    host: dict[str, list[float]],
    profiles: dict[str, Profile],
    *,
    model: str,
    parameters: int,
    buckets: str,
    copy_bytes_per_second: float | None,
    kernels: Collection[str] = (),
) -> Iterator[Result]:
    """One row per variant. whole, host: seconds by round, [rounds] for each variant, `stock_clip` among them.

    kernels: names of the variants whose steps Triton's kernels have decided.
    """
    for name, seconds in whole.items():
        ratios = [mine / stock for mine, stock in zip(seconds, whole["stock_clip"], strict=True)]
        low, high = interval(ratios)
        host_low, host_high = interval(host[name])
        profiled, passes = profiles.get(name), None
        if profiled is not None and copy_bytes_per_second is not None and "plain" in profiles:
            seconds_more = (profiled.device_us - profiles["plain"].device_us) / 1e6
            # A copy reads and writes: reading alone takes half as long.
            passes = seconds_more * copy_bytes_per_second / (4 * parameters)
        yield Result(
            model=model,
            parameters=parameters,
            buckets=buckets,
            variant=name,
            ratio_to_stock_clip=statistics.median(ratios),
            ratio_low=low,
            ratio_high=high,
            step_ms=1e3 * statistics.median(seconds),
            host_ms=1e3 * statistics.median(host[name]),
            host_ms_low=1e3 * host_low,
            host_ms_high=1e3 * host_high,
            rounds=len(seconds),
            kernels=name in kernels,
            profile=profiled,
            gradient_passes=passes,
        )


def groups(variants: Sequence[str], room: int) -> Iterator[list[str]]:
    """Variants that are trained side by side, `plain` and `stock_clip` in each group. room: models in memory."""
    always = [name for name in ("plain", "stock_clip") if name in variants]
    others = [name for name in variants if name not in always]
    width = max(1, room - len(always))
    for first in range(0, max(1, len(others)), width):
        yield [*always, *others[first : first + width]]


def models_that_fit(parameters: int, free_bytes: float) -> int:
    """Return for how many models there is memory: weights, gradients, their buckets and two moments, in float32."""
    return int(MEMORY_SHARE * free_bytes / (5 * 4 * parameters))


def copy_bandwidth(device: torch.device) -> float:
    """Measured bytes per second of a copy on the device, those read and those written counted."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    milliseconds: list[float] = []
    for _ in range(12):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        target.copy_(source)
        ended.record()
        ended.synchronize()
        milliseconds.append(began.elapsed_time(ended))
    return 2 * COPY_BYTES / (statistics.median(milliseconds[2:]) / 1e3)


def train(
    variants: Sequence[str],
    model: str,
    buckets: str,
    device: torch.device,
    rounds: int,
    copy_bytes_per_second: float | None,
) -> list[Result]:
    """Build, time and profile some variants side by side."""
    cuda = device.type == "cuda"
    built = {name: variant_step(name, model, device, views=buckets == "views") for name in variants}
    steps = {name: step for name, (_, step) in built.items()}
    whole, host = time_variants(steps, rounds, torch.cuda.synchronize if cuda else lambda: None)
    profiles = {name: profile_steps(step, PROFILED_STEPS) for name, step in steps.items()} if cuda else {}
    for training, _ in built.values():
        if training.watch is not None:
            training.watch.detach()
    return list(
        results_of(
            whole,
            host,
            profiles,
            model=model,
            parameters=MODELS[model].parameter_count(),
            buckets=buckets,
            copy_bytes_per_second=copy_bytes_per_second,
            kernels=[name for name, (training, _) in built.items() if decided_by_kernels(training.watch)],
        )
    )
