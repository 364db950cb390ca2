"""Which ranks of a run have series of their own, where not all can: the first ones, and those that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.instances import Instance

OUTSTANDING = 16
"""Places for ranks that stand out. All others go to the first ranks, whose series thus never come and go."""
_SILENT_SECONDS = 30.0
"""After so long without a report, a rank is about to be reported as silent."""
_KEPT = 2.0
"""How much further than a rank that has a place another one must stand out, to take it."""


class ShownRanks:
    """Chooses ranks of attempts, and remembers those that stood out."""

    def __init__(self) -> None:
        self._before: WeakKeyDictionary[Attempt, frozenset[int]] = WeakKeyDictionary()

    def of(self, attempt: Attempt, most: int, now: float) -> list[Instance]:
        """Return at most so many ranks of an attempt, and at least `OUTSTANDING`. now: Unix time."""
        ranks = list(attempt.instances.values())
        if len(ranks) <= most:
            return ranks
        ranks.sort(key=lambda instance: instance.rank)
        first = max(0, most - OUTSTANDING)
        shown, others = ranks[:first], ranks[first:]
        before = self._before.get(attempt, frozenset())
        kept = np.array([instance.rank in before for instance in others])
        chosen = outstanding(deviations(ranks)[first:], _silence(others, now), kept)
        found = [others[place] for place in sorted(chosen)]
        self._before[attempt] = frozenset(instance.rank for instance in found)
        return shown + found


def deviations(ranks: Sequence[Instance]) -> NDArray[np.float64]:
    """Return by what factor each rank's local norm differs from the median, as a logarithm; infinite if not finite."""
    norms = np.array([instance.local_norm or np.nan for instance in ranks])
    norms[~(norms > 0)] = np.nan
    found = np.zeros(len(ranks))
    known = ~np.isnan(norms)
    found[known] = np.abs(np.log(norms[known] / np.median(norms[known])))
    found[[bool(instance.local_nonfinite) for instance in ranks]] = np.inf
    return found


def _silence(ranks: Sequence[Instance], now: float) -> NDArray[np.float64]:
    """Return for how many seconds each rank has been silent; 0 for those that report or have left."""
    seconds = np.array([0.0 if instance.closed else now - instance.last_report for instance in ranks])
    return np.where(seconds > _SILENT_SECONDS, seconds, 0.0)


def outstanding(deviation: NDArray[np.float64], silence: NDArray[np.float64], kept: NDArray[np.bool_]) -> list[int]:
    """Return the places of the ranks that stand out most: first the silent ones, then those with unusual norms.

    kept: which of them stood out before.
    """
    weighted = np.where(kept, deviation * _KEPT, deviation)
    order = np.lexsort((np.arange(len(kept)), ~kept, -weighted, -silence))
    found: list[int] = order[:OUTSTANDING].tolist()
    return found
