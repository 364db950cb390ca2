"""A run's steps, downsampled for a chart. Steps do not change, so bins that are complete are kept, and extended."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache

from foreshock_collector.state.store import Store

Columns = dict[str, list[Any]]

_PAGE_STEPS = 10_000
"""Steps read before other requests get their turn: about 25 ms."""
_MOST_CACHED = 16
"""Pairs of an attempt and a bin width that are kept: those that people look at."""


@dataclass
class _Bins:
    """The complete bins of one attempt, at one bin width."""

    columns: Columns = field(default_factory=dict)
    last: int = 0
    """Sequence number of the last step in a complete bin."""


class Downsampler:
    """Reduces steps to the one with the largest norm in each bin."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache: LRUCache[tuple[str, int, int], _Bins] = LRUCache(_MOST_CACHED)
        self._lock = asyncio.Lock()

    async def bins(self, run: str, attempt: int, *, first: int, last: int, points: int) -> tuple[int, Columns]:
        """Return the bin width and the columns: about `points` rows, at most twice as many.

        The width is a power of two: it stays the same while a run goes on, but for the few times that it doubles.
        """
        bin_width = 1
        while last - first + 1 > bin_width * points:
            bin_width *= 2
        if last - first + 1 <= _PAGE_STEPS:
            return bin_width, self._store.peaks(run, attempt=attempt, first=first, last=last, bin_width=bin_width)
        # One at a time: two viewers must not extend the same bins.
        async with self._lock:
            key = run, attempt, bin_width
            bins: _Bins = self._cache.setdefault(key, _Bins())
            complete = last // bin_width * bin_width
            page = max(bin_width, _PAGE_STEPS // bin_width * bin_width)
            while bins.last < complete:
                upto = min(bins.last + page, complete)
                _extend(bins.columns, self._peaks(key, bins.last + 1, upto))
                bins.last = upto
                await asyncio.sleep(0)
            # Without a complete bin: a single point was asked for, which is wider than all steps.
            sequences = bins.columns.get("sequence", [])
            start, end = bisect_left(sequences, first), bisect_right(sequences, last)
            found = {name: values[start:end] for name, values in bins.columns.items()}
            if last > bins.last:
                _extend(found, self._peaks(key, max(first, bins.last + 1), last))
            return bin_width, found

    def _peaks(self, key: tuple[str, int, int], first: int, last: int) -> Columns:
        run, attempt, bin_width = key
        return self._store.peaks(run, attempt=attempt, first=first, last=last, bin_width=bin_width)


def _extend(columns: Columns, more: Columns) -> None:
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)
