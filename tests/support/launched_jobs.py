"""Jobs under torchrun: what they print, and the recorders that they start."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT

TRAINING = ROOT / "tests/end_to_end/train.py"
Job = Callable[..., "subprocess.Popen[str]"]


def said(process: Any) -> str:
    text, _ = process.communicate(timeout=120)
    return str(text)


def recorders(folder: Path) -> list[int]:
    """Process ids of the recorders that read rings in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "foreshock_recorder" in command and any(part.startswith(str(folder)) for part in command):
            found.append(int(process.name))
    return found
