"""How many runs may report at the same time, in all and from one machine: each costs memory, series and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from foreshock_collector.ingest.session import RefusedError
from foreshock_collector.state.runs import Run

_SHARE_OF_ONE_MACHINE = 0.5
"""Part of all runs that a single machine may have: it must not shut the others out."""


class RunLimits:
    """Counts the runs whose series are exported, by the machine that began them."""

    def __init__(self, most: int) -> None:
        """most: runs in all."""
        self._most = most
        self._runs = 0
        self._by_host: Counter[str] = Counter()

    def count(self, runs: Iterable[Run]) -> None:
        """Count these runs, and none of before; about once a second."""
        self._by_host = Counter(run.host for run in runs)
        self._runs = self._by_host.total()

    def admit(self, host: str) -> None:
        """Count one more run of a machine. Raises `RefusedError` if there are too many."""
        if self._runs >= self._most:
            raise RefusedError(f"{self._runs} runs report already, the most that --most-runs allows", reason="limit")
        if host and self._by_host[host] >= max(1, self._most * _SHARE_OF_ONE_MACHINE):
            text = f"{self._by_host[host]} runs of {host} report already, half of what --most-runs allows"
            raise RefusedError(text, reason="limit")
        self._runs += 1
        self._by_host[host] += 1
