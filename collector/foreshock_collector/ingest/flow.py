"""How often recorders send: less often where the collector is busy, since its cost follows messages."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SECONDS = 5.0
"""The longest interval. A rank counts as live for twice as long (`Run.has_live_ranks`)."""
_BUSY, _AT_EASE = 0.7, 0.4
"""Shares of the time that make the interval longer and shorter: further apart than one change moves the load."""
_CHANGE = 1.5
_FEW_MESSAGES = 100.0
"""A second: so few are not what keeps a collector busy, and a longer interval would not help."""


def next_interval(seconds: float, *, busy: float, messages: float, least: float) -> float:
    """Return the interval that follows one of so many seconds.

    busy: share of the time that the collector was busy. messages: received a second.
    """
    if busy < _AT_EASE or messages < _FEW_MESSAGES:
        return max(least, seconds / _CHANGE)
    return max(least, min(seconds * _CHANGE, MOST_SECONDS)) if busy > _BUSY else seconds


class Flow:
    """Sets the interval by how busy the process is.

    least: seconds. clock, processor: return monotonic seconds, and those in which this process had a processor.
    """

    def __init__(
        self,
        least: float,
        clock: Callable[[], float] = time.monotonic,
        processor: Callable[[], float] = time.process_time,
    ) -> None:
        self._least = least
        self._clock = clock
        self._processor = processor
        self.seconds = least
        """Between two commits, two acknowledgements, and two messages of a recorder."""
        self._before = clock(), processor(), 0
        self._late = 0.0

    def add_delay(self, seconds: float) -> None:
        """Add by how much the event loop was late: where others use the processor too, this shows it, not its use."""
        self._late += seconds

    def adapt(self, messages: int) -> None:
        """Set the interval by what has been since this was last called. messages: received until now."""
        now = self._clock(), self._processor(), messages
        elapsed, used, received = (new - old for new, old in zip(now, self._before, strict=True))
        if elapsed > 0:
            busy = max(used, self._late) / elapsed
            self.seconds = next_interval(self.seconds, busy=busy, messages=received / elapsed, least=self._least)
        self._before, self._late = now, 0.0

    def seconds_for(self, held_seconds: float) -> float:
        """Return the interval of a recorder. held_seconds: how long the collector keeps a step of its job in memory.

        Its ranks must not be so far apart that steps are finalized without some of them.
        """
        return max(self._least, min(self.seconds, held_seconds / 4))
