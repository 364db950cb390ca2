"""The clock of the machine, and by how much somebody has set it."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST_SECONDS = 2.0
"""A smaller difference may be a correction by NTP, or a process that was not running."""


class SystemClock:
    """Returns Unix time when called."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        """Return Unix time."""
        return self._wall()

    def jumped(self) -> float:
        """Return by how many seconds the clock was set, forward or back, since this was last asked; 0: it was not."""
        offset = self._wall() - self._monotonic()
        seconds, self._offset = offset - self._offset, offset
        return seconds if abs(seconds) >= _LEAST_SECONDS else 0.0
