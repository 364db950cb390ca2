"""How many runs may report at the same time, with how many launches and ranks, in all and from one machine.

Each costs memory, series and time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from foreshock_collector.ingest.session import RefusedError
from foreshock_collector.state.runs import Run

MOST_RANKS = 262_144
"""Four of the largest jobs. A rank takes 4 kB, and keeps them while its run reports, across all restarts."""
_LAUNCHES_OF_A_RUN = 10
"""On average: a job that restarts more often leaves room for others."""
_SHARE_OF_ONE_MACHINE = 0.5
"""Part of all that a single machine may have: it must not shut the others out."""


class _Limit:
    """Counts things of one kind, by the machine that began their run."""

    def __init__(self, kind: str, most: int, setting: str) -> None:
        self._kind, self._most, self._setting = kind, most, setting
        self._all = 0
        self._by_host: Counter[str] = Counter()

    def count(self, by_host: Counter[str]) -> None:
        self._all, self._by_host = by_host.total(), by_host

    def check(self, host: str) -> None:
        if self._all >= self._most:
            text = f"{self._all} {self._kind} report already, the most that {self._setting} allows"
            raise RefusedError(text, reason="limit")
        if host and self._by_host[host] >= max(1, self._most * _SHARE_OF_ONE_MACHINE):
            text = f"{self._by_host[host]} {self._kind} of {host} report already, half of what {self._setting} allows"
            raise RefusedError(text, reason="limit")

    def add(self, host: str) -> None:
        self._all += 1
        self._by_host[host] += 1


class RunLimits:
    """Counts the runs whose series are exported, their launches and their ranks."""

    def __init__(self, most: int) -> None:
        """most: runs in all."""
        self._runs = _Limit("runs", most, "--most-runs")
        self._launches = _Limit("launches", most * _LAUNCHES_OF_A_RUN, "--most-runs")
        self._ranks = _Limit("ranks", MOST_RANKS, "a collector")

    def count(self, runs: Iterable[Run]) -> None:
        """Count these runs, and none of before; about once a second."""
        counted, launches, ranks = Counter[str](), Counter[str](), Counter[str]()
        for run in runs:
            counted[run.host] += 1
            launches[run.host] += len(run.attempts)
            ranks[run.host] += sum(len(attempt.instances) for attempt in run.attempts)
        self._runs.count(counted)
        self._launches.count(launches)
        self._ranks.count(ranks)

    def admit(self, host: str, *, launch: bool, rank: bool) -> None:
        """Count what a hello of a machine begins: a launch, which may be a run, and a rank. Raises `RefusedError`."""
        begun = (self._runs, self._launches) * launch + (self._ranks,) * rank
        for each in begun:
            each.check(host)
        for each in begun:
            each.add(host)
