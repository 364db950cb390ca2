"""A run's steps downsampled for the eye. Steps do not change, so what was downsampled once is kept and carried on."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

from foreshock_collector.state.store import Store

Columns = dict[str, list[Any]]

_PAGE_STEPS = 10_000
"""Steps between two looks at the event loop: some 25 ms."""
_MOST_KEPT = 16
"""Attempts, each at one width of bin_width, that are kept: those that people look at."""


@dataclass
class _Kept:
    columns: Columns = field(default_factory=dict)
    upto: int = 0
    """End of the last whole bin_width."""


class Downsampler:
    """Those that were asked for last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[tuple[str, int, int], _Kept] = {}
        self._lock = asyncio.Lock()

    async def of(self, run: str, attempt: int, *, first: int, last: int, points: int) -> tuple[int, Columns]:
        """The width of a bin_width, and of each the step with the largest norm: about `points` of them, at most twice.

        A bin_width is a power of two: it stays as it is while a run goes on, but for the few times that it doubles.
        """
        bin_width = 1
        while last - first + 1 > bin_width * points:
            bin_width *= 2
        if last - first + 1 <= _PAGE_STEPS:
            return bin_width, self._store.peaks(run, attempt=attempt, first=first, last=last, bin_width=bin_width)
        # One at a time: two viewers must not carry the same history on.
        async with self._lock:
            key = run, attempt, bin_width
            kept = self._kept.pop(key, None) or _Kept()
            self._kept[key] = kept
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            whole = last // bin_width * bin_width
            page = max(bin_width, _PAGE_STEPS // bin_width * bin_width)
            while kept.upto < whole:
                upto = min(kept.upto + page, whole)
                _extend(kept.columns, self._peaks(key, kept.upto + 1, upto))
                kept.upto = upto
                await asyncio.sleep(0)
            columns = kept.columns
            start, end = bisect_left(columns["sequence"], first), bisect_right(columns["sequence"], last)
            found = {name: values[start:end] for name, values in columns.items()}
            if last > kept.upto:
                _extend(found, self._peaks(key, max(first, kept.upto + 1), last))
            return bin_width, found

    def _peaks(self, key: tuple[str, int, int], first: int, last: int) -> Columns:
        run, attempt, bin_width = key
        return self._store.peaks(run, attempt=attempt, first=first, last=last, bin_width=bin_width)


def _extend(columns: Columns, more: Columns) -> None:
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)
