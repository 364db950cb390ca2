"""The newest steps of every run as a few points each, for the sparklines on the page of all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachetools import LRUCache

from foreshock_collector.records.steps import finite
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store

STEPS = 512
POINTS = 64
_BIN_WIDTH = STEPS // POINTS
_MOST_FROM_STORE = 50
"""Runs whose steps are in the store alone: those of the newest few are read, once."""

Columns = dict[str, list[float | None]]


class Sparklines:
    """Reads the points of each run, and keeps those of evicted runs: they do not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache: LRUCache[tuple[str, int, int], Columns] = LRUCache(_MOST_FROM_STORE)

    def points(self, runs: Sequence[Run | None]) -> list[Columns | None]:
        """Return loss and norm of each run's newest attempt, oldest first; None without a run, or where that is too
        much to read.
        """
        budget = iter(range(_MOST_FROM_STORE))
        return [None if run is None else run.errors.value("page", None, self._points, run, budget) for run in runs]

    def _points(self, run: Run, budget: Iterator[int]) -> Columns | None:
        attempt = run.newest
        if not attempt.evicted:
            steps = list(attempt.steps)
            return _downsampled([step.global_norm for step in steps], [step.loss for step in steps])
        if next(budget, None) is None:
            return None
        key = run.name, attempt.number, attempt.finalized
        if key not in self._cache:
            self._cache[key] = self._load(*key)
        found: Columns = self._cache[key]
        return found

    def _load(self, run: str, attempt: int, finalized: int) -> Columns:
        columns = self._store.peaks(
            run, attempt=attempt, first=finalized - STEPS + 1, last=finalized, bin_width=_BIN_WIDTH
        )
        return {"global_norm": columns["global_norm"], "loss": columns["loss"]}


def _downsampled(norms: Sequence[float | None], losses: Sequence[float | None]) -> Columns:
    """Return the largest norm of each bin, None if one is not finite, and its last loss."""
    starts = range(0, len(norms), max(1, len(norms) // POINTS))
    bin_width = starts.step
    largest: list[float | None] = []
    for start in starts:
        values = [finite(norm) for norm in norms[start : start + bin_width]]
        largest.append(None if None in values else max(value for value in values if value is not None))
    return {"global_norm": largest, "loss": [finite(losses[min(s + bin_width, len(losses)) - 1]) for s in starts]}
