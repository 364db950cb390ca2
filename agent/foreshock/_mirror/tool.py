"""What the mirror needs of an experiment tool."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

PREFIX = "foreshock/"
"""Begins every name that the mirror writes."""
LOSS, NORM = f"{PREFIX}loss", f"{PREFIX}gradient_norm"
NOTICE, PAGE = f"{PREFIX}notice", f"{PREFIX}page"


def size(values: Mapping[str, float]) -> tuple[bool, float]:
    """Return what orders steps by their norm: those with a NaN, or a loss that is not finite, are the largest."""
    norm = values.get(NORM, 0.0)
    broken = math.isnan(norm) or not math.isfinite(values.get(LOSS, 0.0))
    return broken, 0.0 if math.isnan(norm) else norm


class OpenRun(Protocol):
    """Takes what the mirror writes into one run of a tool. Methods raise what the tool raises."""

    @property
    def closed(self) -> bool:
        """Whether the script has closed it since."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step. values: by name, with `PREFIX`."""

    def notify(self, text: str) -> None:
        """Write a sentence about the run."""

    def link(self, page: str) -> None:
        """Write the address of the run's page."""

    def flush(self) -> None:
        """Have everything stored: the rank leaves."""


Find = Callable[[], OpenRun | None]
"""Returns the run of a tool that the script has open on this rank, if any. Imports nothing."""
