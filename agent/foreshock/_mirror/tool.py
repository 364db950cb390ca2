"""What the mirror needs of an experiment tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

PREFIX = "foreshock/"
"""Begins every name that the mirror writes."""
NOTICE, PAGE = f"{PREFIX}notice", f"{PREFIX}page"


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
