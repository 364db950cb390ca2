"""Counts what a training step does on a GPU, from a profile: launches, copies, waits, and time on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunch", "cuLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
"""Calls in which a step waits for the device. `cudaDeviceSynchronize` is this benchmark's own."""
COPIES = ("Memcpy", "Memset")
RANGES = ("nccl:", "Optimizer.", "DistributedDataParallel", "record_param_comms", "## ")
"""Beginnings of the names of ranges that torch marks. A range spans kernels that are events as well."""


class Event(Protocol):
    """Describes what is read of an event of the profiler."""

    name: str
    device_type: Any
    device_time_total: float
    is_user_annotation: bool


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Counts of one step, averaged over those that were profiled."""

    launches: float
    """Kernels that the host launched."""
    copies: float
    """Copies and fills of memory that ran on the device."""
    waits: float
    """Calls in which the host waited for the device."""
    device_us: float
    """Time of all kernels and copies on the device, one after another."""


def summarize(events: Iterable[Event], steps: int) -> Profile:
    """Count the events of some steps."""
    launches = copies = waits = 0
    device_us = 0.0
    for event in events:
        if event.device_type.name == "CUDA":
            if not (event.is_user_annotation or event.name.startswith(RANGES)):
                copies += event.name.startswith(COPIES)
                device_us += event.device_time_total
        else:
            launches += event.name.startswith(LAUNCHES)
            waits += event.name in WAITS
    return Profile(launches=launches / steps, copies=copies / steps, waits=waits / steps, device_us=device_us / steps)


def profile_steps(step: Callable[[], None], steps: int) -> Profile:
    """Profile some steps, without the start of the profiler."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return summarize(profiler.events() or (), steps)
