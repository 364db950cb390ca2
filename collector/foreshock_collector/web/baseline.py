"""The band in which a run's norms usually lie: the detector's own history, replayed over the stored steps."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from foreshock_collector.analysis.detection import Detector
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.store import Store

_PAGE_STEPS = 2000
"""Steps between two looks at the event loop: some 15 ms."""
_MOST_KEPT = 8
"""Attempts whose band is kept to be carried on: those that people look at."""


class Baseline:
    """Of one attempt, from its first step on: what was expected of each step before it came."""

    def __init__(self, rules: Rules = DEFAULT) -> None:
        self._rules, self._detector = rules, Detector()
        self._sequences, self._low, self._high = array("q"), array("d"), array("d")

    @property
    def position(self) -> int:
        """Sequence number up to which steps have been replayed."""
        return self._sequences[-1] if self._sequences else 0

    def extend(self, columns: dict[str, list[Any]]) -> None:
        """Replay steps, in order; columns as `Store.steps` gives them."""
        names = ("sequence", "global_norm", "learning_rate", "loss_nonfinite", "gradient_nonfinite")
        detector = self._detector
        for sequence, norm, rate, bad_loss, bad_gradient in zip(*(columns[name] for name in names), strict=True):
            low, high = detector.gradient.band(self._rules.gradient) or (math.nan, math.nan)
            self._sequences.append(sequence)
            self._low.append(low)
            self._high.append(high)
            detector.update(
                attempt=0,
                sequence=sequence,
                step=0,
                norm=math.nan if norm is None else norm,
                loss=None,
                rate=math.nan if rate is None else rate,
                nonfinite=bool(bad_loss) + bool(bad_gradient),
                rules=self._rules,
            )

    def at(self, sequences: Sequence[int]) -> dict[str, list[float | None]]:
        """Lower and upper edge at these steps; None while there was too little history."""
        places = np.searchsorted(np.frombuffer(self._sequences, np.int64), np.array(sequences, np.int64))
        found = {}
        for name, edge in (("usual_low", self._low), ("usual_high", self._high)):
            values = np.frombuffer(edge, np.float64)[places] if len(places) else np.empty(0)
            found[name] = [value if math.isfinite(value) else None for value in values.tolist()]
        return found


class Baselines:
    """Those that were asked for last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[tuple[str, int], Baseline] = {}
        self._lock = asyncio.Lock()

    async def upto(self, run: str, attempt: int, last: int, rules: Rules) -> Baseline:
        """The baseline of an attempt, replayed at least to this sequence number, as far as steps are stored."""
        # One at a time: two viewers must not replay the same steps into one history.
        async with self._lock:
            baseline = self._kept.pop((run, attempt), None) or Baseline(rules)
            self._kept[run, attempt] = baseline
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            while baseline.position < last:
                columns = self._store.steps(run, attempt=attempt, after=baseline.position, limit=_PAGE_STEPS)
                if not columns["sequence"]:
                    break
                baseline.extend(columns)
                await asyncio.sleep(0)
            return baseline
