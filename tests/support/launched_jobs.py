"""Jobs under torchrun: what they print, and the recorders that they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tests.support.repository import ROOT

TRAINING = ROOT / "tests/end_to_end/train.py"
STANDALONE = ("--standalone",)


class Launched(Protocol):
    """Ranks under torchrun, or forked."""

    @property
    def pid(self) -> int:
        """Of torchrun, or of rank 0."""

    def communicate(self, *, timeout: float) -> tuple[str, Any]: ...
    def wait(self, timeout: float) -> int: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def send_signal(self, number: int) -> None: ...


Job = Callable[..., Launched]


def said(process: Launched) -> str:
    """What launcher and ranks have written in the end."""
    text, _ = process.communicate(timeout=120)
    return text


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
