"""How long a step waits for ranks that have not reported it. Times come in as arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PATIENCE_SECONDS = 2.0
"""How long a step waits for ranks that have not reported it."""
LAG_SECONDS = 10.0
"""The same for a rank that has sent other records within this time: its connection may have been cut for a moment."""
NONFINITE_PATIENCE_SECONDS = 0.3
"""How long a non-finite step waits for them: it should be reported soon, yet the other ranks' evidence is worth a
moment. Recorders send such a step at once."""

Sequences = NDArray[np.int64]


class Deadlines:
    """Holds the times until which the newest `capacity` steps of an attempt wait."""

    def __init__(self, capacity: int, world_size: int) -> None:
        self._capacity = capacity
        self._usual = np.full(capacity, math.inf)
        self._nonfinite = np.full(capacity, math.inf)
        self._advanced = np.full(world_size, -math.inf)
        """When each rank last sent records."""
        self._earliest = math.inf
        """No step has waited long enough before this time, and perhaps none has afterwards."""

    def start(self, ranks: Sequence[int], sequences: Sequences, nonfinite: Sequences, now: float) -> None:
        """Let steps wait, counted from the first ranks that report them. nonfinite: those that are not finite."""
        self._advanced[ranks] = now
        for deadlines, steps, deadline in (
            (self._usual, sequences, now + PATIENCE_SECONDS),
            (self._nonfinite, nonfinite, now + NONFINITE_PATIENCE_SECONDS),
        ):
            slots = steps % self._capacity
            deadlines[slots] = np.minimum(deadlines[slots], deadline)
            self._earliest = min(self._earliest, deadline) if len(slots) else self._earliest

    def end(self, sequence: int) -> None:
        """Let a step wait no longer: it is assembled."""
        self._usual[sequence % self._capacity] = self._nonfinite[sequence % self._capacity] = math.inf

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time."""
        for times in (self._usual, self._nonfinite, self._advanced):
            times += seconds
        self._earliest += seconds

    def none_passed(self, now: float) -> bool:
        """Return whether no step can have waited long enough yet: this is asked of each run many times a second."""
        if now >= self._earliest:
            # That of a step that has ended since, or still waits for a rank.
            self._earliest = min(float(self._usual.min()), float(self._nonfinite.min()))
        return now < self._earliest

    def passed(
        self, sequences: Sequences, now: float, *, positions: Sequences, awaited: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return which steps have waited long enough.

        positions: the newest step of each rank. awaited: ranks that may still report.
        """
        lagging = awaited & (self._advanced > now - LAG_SECONDS)
        first = int(positions[lagging].min()) + 1 if lagging.any() else int(positions.max()) + 1
        longer = np.where(sequences >= first, LAG_SECONDS - PATIENCE_SECONDS, 0.0)
        slots = sequences % self._capacity
        late: NDArray[np.bool_] = (self._nonfinite[slots] <= now) | (self._usual[slots] + longer <= now)
        return late
