"""The newest steps of every run as a few points each, for the sparklines of the fleet."""

from __future__ import annotations

from collections.abc import Sequence

from foreshock_collector.records.steps import finite
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store

STEPS = 512
POINTS = 64
_BIN_WIDTH = STEPS // POINTS
_MOST_FROM_STORE = 50
"""Runs at rest have their steps in the store alone: the newest few are read, once."""

Columns = dict[str, list[float | None]]


class Sparklines:
    """Remembers what it has read of runs at rest: they do not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[tuple[str, int, int], Columns] = {}

    def of(self, runs: Sequence[Run]) -> list[Columns | None]:
        """Loss and norm of each run, newest attempt, oldest point first; None where that is too much to read."""
        at_rest: dict[tuple[str, int, int], Columns] = {}
        found = [run.errors.value("page", None, self._of_one, run, at_rest) for run in runs]
        self._read = at_rest
        return found

    def _of_one(self, run: Run, at_rest: dict[tuple[str, int, int], Columns]) -> Columns | None:
        attempt = run.newest
        if not attempt.evicted:
            steps = list(attempt.steps)
            return _downsampled([step.global_norm for step in steps], [step.loss for step in steps])
        if len(at_rest) >= _MOST_FROM_STORE:
            return None
        key = run.name, attempt.number, attempt.finalized
        at_rest[key] = self._read.get(key) or self._load(*key)
        return at_rest[key]

    def _load(self, run: str, attempt: int, finalized: int) -> Columns:
        columns = self._store.peaks(
            run, attempt=attempt, first=finalized - STEPS + 1, last=finalized, bin_width=_BIN_WIDTH
        )
        return {"global_norm": columns["global_norm"], "loss": columns["loss"]}


def _downsampled(norms: Sequence[float | None], losses: Sequence[float | None]) -> Columns:
    """Of each bin_width the largest norm, None if one is not finite, and the last loss."""
    starts = range(0, len(norms), max(1, len(norms) // POINTS))
    bin_width = starts.step
    tops: list[float | None] = []
    for start in starts:
        values = [finite(norm) for norm in norms[start : start + bin_width]]
        tops.append(None if None in values else max(value for value in values if value is not None))
    return {"global_norm": tops, "loss": [finite(losses[min(s + bin_width, len(losses)) - 1]) for s in starts]}
