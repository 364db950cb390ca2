"""Where commands write for people."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console

_UNLIMITED = 100_000
"""Columns: wider than any table or sentence."""


def terminal() -> Console:
    """Standard output. A terminal folds what is wider than itself; a pipe or a file gets whole lines."""
    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(no_color=True if "NO_COLOR" in os.environ else None, highlight=False, width=width)


def shown(value: Any, kind: str = "") -> str:
    """A number as people read it. kind: "nan" or "inf" in place of one that is not finite; nothing known: "-"."""
    return kind or ("-" if value is None else f"{value:.4g}")
