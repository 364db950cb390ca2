"""Terminal output of the commands."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_UNLIMITED = 100_000
"""Width in columns, wider than any table or sentence."""
_PATIENCE_SECONDS, _AGAIN_SECONDS = 2.0, 0.2
"""Delay before progress appears, and the time between updates."""


def terminal() -> Console:
    """Return a console on standard output. Lines wrap on a terminal and stay whole in a pipe or a file."""
    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(no_color=True if "NO_COLOR" in os.environ else None, highlight=False, width=width)


def shown(value: Any, kind: str = "") -> str:
    """Format a number. kind is "nan" or "inf" for a non-finite value; an unknown value becomes "-"."""
    return kind or ("-" if value is None else f"{value:.4g}")


@contextmanager
def working(progress: Callable[[], str]) -> Iterator[None]:
    """Show progress on standard error while the block runs, if that is a terminal; clear it afterwards.

    progress: returns the text of the line; called from another thread.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def update() -> None:
        if done.wait(_PATIENCE_SECONDS):
            return
        while True:
            sys.stderr.write(f"\r\x1b[K{progress()}")
            sys.stderr.flush()
            if done.wait(_AGAIN_SECONDS):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    thread = threading.Thread(target=update, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
