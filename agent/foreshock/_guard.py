"""The one guard at every hook entry: an internal error of the probe costs a record, never the run."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from foreshock._log import warn_once


class DropCounter(Protocol):
    """Where a dropped record is counted."""

    def count_dropped(self, reason: str) -> None:
        """Count one."""

    def write_error(self, text: str) -> None:
        """Keep why."""


class Guard:
    """`with guard:` swallows an internal error: counted, noted, said once. In strict mode it is raised instead."""

    def __init__(self, counter: DropCounter, *, strict: bool) -> None:
        self._counter = counter
        self._strict = strict

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or self._strict:
            return False
        text = f"{type(error).__name__}: {error}"
        self._counter.count_dropped("probe_error")
        self._counter.write_error(text)
        warn_once("probe_error", f"an internal error dropped a step record; training continues ({text})")
        return True
