"""Waits for what must come to hold; the limits only end a test that hangs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 60.0
DEADLINE = 90.0


def eventually(ask: Callable[[], Any], wanted: str) -> Any:
    """Ask until the answer is true; what it was."""
    deadline = time.monotonic() + DEADLINE
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
    """A port on which nothing listens, most likely for a while."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
