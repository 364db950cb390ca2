"""The guard around each part of the probe: an internal error costs a record, never the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol

from foreshock._log import warn_once

P = ParamSpec("P")


class DropCounter(Protocol):
    """Counts dropped records."""

    def count_dropped(self, reason: str) -> None:
        """Count one."""

    def write_error(self, text: str) -> None:
        """Keep the reason."""


class Guard:
    """Counts internal errors of the probe, keeps the newest, and logs one. In strict mode it raises them."""

    def __init__(self, counter: DropCounter, *, strict: bool) -> None:
        self._counter = counter
        self._strict = strict

    def run(self, part: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
        """Run a part; an error in it is counted."""
        try:
            part(*arguments, **options)
        except Exception as error:
            self.count(error)

    def count(self, error: Exception) -> None:
        """Count, keep and log an error that the caller has just caught."""
        if self._strict:
            raise error
        text = f"{type(error).__name__}: {error}"
        self._counter.count_dropped("probe_error")
        self._counter.write_error(text)
        warn_once("probe_error", f"an internal error dropped a step record; training continues ({text})")
