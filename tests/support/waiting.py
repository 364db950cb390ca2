"""Waits for what must come to hold; the limits only end a test that hangs."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def _patience() -> float:
    """How many times as long as on a quiet machine of our own things may take here: by a sum, timed, and by how many
    tests share a core. TEST_PATIENCE sets it."""
    if text := os.environ.get("TEST_PATIENCE"):
        return float(text)
    began = time.perf_counter()
    sum(number * number for number in range(500_000))
    slowness = (time.perf_counter() - began) / QUIET_SECONDS
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1.0, slowness) * max(1.0, workers / len(os.sched_getaffinity(0)))


QUIET_SECONDS = 0.03
"""For that sum."""
PATIENCE = _patience()
WAIT_SECONDS = 60.0 * PATIENCE
"""For anything that a test waits for: long enough for the slowest, since only a test that hangs gets so far."""


def eventually(ask: Callable[[], Any], wanted: str, *, after: float = 0.0) -> Any:
    """Ask until the answer is true; what it was. after: seconds that it has to take on any machine."""
    deadline = time.monotonic() + after + WAIT_SECONDS
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"never came: {wanted}"
        time.sleep(0.05)
    return answer


def until(what: Callable[[], bool]) -> None:
    """Shared memory wakes nobody: look until it holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def free_port() -> int:
    """A port that stays free while nothing listens there: below those that the kernel gives to connections."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    # Not the shared generator, which other workers may have seeded alike.
    for port in random.SystemRandom().sample(range(lowest // 2, lowest), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
