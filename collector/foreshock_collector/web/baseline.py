"""The band in which a run's norms usually lie: the detector's own history, replayed over the stored steps."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.detection import Detector
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.store import Store

_PAGE_STEPS = 2000
"""Steps replayed before other requests get their turn: about 15 ms."""
_MOST_CACHED = 8
"""Attempts whose baseline is kept and extended: those that people look at."""


class Baseline:
    """Holds, for each step of one attempt, the band in which its norm was expected before it came."""

    def __init__(self, rules: Rules = DEFAULT, inherited: ChannelState | None = None) -> None:
        """inherited: norms of the attempt that this one continues."""
        self._rules = rules
        self._detector = Detector() if inherited is None else Detector(gradient=inherited.history())
        self._sequences, self._low, self._high = array("q"), array("d"), array("d")

    @property
    def position(self) -> int:
        """Return the sequence number of the last step that was replayed."""
        return self._sequences[-1] if self._sequences else 0

    def extend(self, columns: dict[str, list[Any]]) -> None:
        """Replay steps, in order; columns as `Store.steps` returns them."""
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
        """Return lower and upper edge at these steps; None while there was too little history."""
        indices = np.searchsorted(np.frombuffer(self._sequences, np.int64), np.array(sequences, np.int64))
        found = {}
        for name, edge in (("usual_low", self._low), ("usual_high", self._high)):
            values = np.frombuffer(edge, np.float64)[indices] if len(indices) else np.empty(0)
            found[name] = [value if math.isfinite(value) else None for value in values.tolist()]
        return found


class Baselines:
    """Keeps the baselines that were asked for most recently, and extends them as runs go on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache: LRUCache[tuple[str, int], Baseline] = LRUCache(_MOST_CACHED)
        self._lock = asyncio.Lock()

    async def replayed(
        self, run: str, attempt: int, last: int, rules: Rules, inherited: ChannelState | None
    ) -> Baseline:
        """Return the baseline of an attempt, replayed at least to this sequence number, as far as steps are stored.

        inherited: norms of the attempt that this one continues, once it has made a step.
        """
        # One at a time: two viewers must not replay the same steps into one history.
        async with self._lock:
            baseline = self._cache.get((run, attempt))
            if baseline is None or not baseline.position:
                baseline = self._cache[run, attempt] = Baseline(rules, inherited)
            while baseline.position < last:
                columns = self._store.steps(run, attempt=attempt, after=baseline.position, limit=_PAGE_STEPS)
                if not columns["sequence"]:
                    break
                baseline.extend(columns)
                await asyncio.sleep(0)
            return baseline
