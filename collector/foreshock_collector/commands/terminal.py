"""Where commands write for people."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_UNLIMITED = 100_000
"""Columns: wider than any table or sentence."""
_PATIENCE_SECONDS, _AGAIN_SECONDS = 2.0, 0.2
"""Work that takes longer says how far it is, and how often."""


def terminal() -> Console:
    """Standard output. A terminal folds what is wider than itself; a pipe or a file gets whole lines."""
    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(no_color=True if "NO_COLOR" in os.environ else None, highlight=False, width=width)


def shown(value: Any, kind: str = "") -> str:
    """A number as people read it. kind: "nan" or "inf" in place of one that is not finite; nothing known: "-"."""
    return kind or ("-" if value is None else f"{value:.4g}")


@contextmanager
def working(progress: Callable[[], str]) -> Iterator[None]:
    """On a terminal, what lasts says on standard error how far it is, in a line that goes when it is done.

    progress: the line's text, asked for in a thread. In a pipe nothing is said.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def tell() -> None:
        if done.wait(_PATIENCE_SECONDS):
            return
        while True:
            sys.stderr.write(f"\r\x1b[K{progress()}")
            sys.stderr.flush()
            if done.wait(_AGAIN_SECONDS):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
