"""What each kind of fault has cost: from its beginning to that of the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

RANKS = 2
"""Of the job."""
Pair = tuple[float, float]
"""Seconds of a step, and of the same step in rings that nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Describes the moment at which a fault began."""

    fault: str
    launch: str
    """Newest at that moment."""
    steps: int
    """That it had finished."""
    regressions: int
    """Counters that had gone back."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Names the steps of one launch from the beginning of a fault to that of the next."""

    fault: str
    launch: str
    first: int
    end: int

    @property
    def sequences(self) -> range:
        return range(self.first + 1, self.end + 1)


def table(
    marks: Sequence[Mark], finished: Mapping[str, Sequence[Pair]], kept: Mapping[str, set[int]], regressions: int
) -> Iterator[str]:
    """Yield the lines of the table, a row for each kind of fault.

    finished: steps of each launch, in order. kept: sequence numbers of those that are stored. regressions: in the end.
    """
    header = ("times", "sent", "stored", "lost", "back", "median", "unread", "99 %", "unread")
    yield f"{'fault':<36}" + "".join(f"{each:>8}" for each in header)
    windows = list(_windows(marks, finished))
    later = [*(mark.regressions for mark in marks[1:]), regressions]
    for fault in dict.fromkeys(mark.fault for mark in marks):
        own = [window for window in windows if window.fault == fault]
        times = sum(mark.fault == fault for mark in marks)
        sent = sum(len(window.sequences) for window in own)
        stored = sum(len(kept[window.launch].intersection(window.sequences)) for window in own)
        back = sum(after - mark.regressions for mark, after in zip(marks, later, strict=True) if mark.fault == fault)
        pairs = [pair for window in own for pair in finished[window.launch][window.first : window.end]]
        read, unread = (quantiles(each) for each in zip(*pairs, strict=True)) if pairs else ([0.0] * 3, [0.0] * 3)
        micros = (1e6 * each for each in (read[0], unread[0], read[1], unread[1]))
        figures = (times, sent, stored, sent - stored, back, *map(round, micros))
        yield f"{fault:<36}" + "".join(f"{each:>8}" for each in figures)


def _windows(marks: Sequence[Mark], finished: Mapping[str, Sequence[Pair]]) -> Iterator[_Window]:
    launches = list(finished)
    for mark, after in zip_longest(marks, marks[1:]):
        last = launches[-1] if after is None else after.launch
        for launch in launches[launches.index(mark.launch) : launches.index(last) + 1]:
            first = mark.steps if launch == mark.launch else 0
            end = after.steps if after is not None and launch == after.launch else len(finished[launch])
            yield _Window(fault=mark.fault, launch=launch, first=first, end=end)


def quantiles(durations: Iterable[float]) -> list[float]:
    """Return the median, and what 99 % and 99.9 % are below."""
    ordered = sorted(durations)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 0.999)]


def processes(folder: Path) -> list[str]:
    """Return the command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may have ended.
        with suppress(OSError):
            command = (process / "cmdline").read_text().replace("\0", " ")
            if str(folder) in command:
                found.append(command)
    return found


def stored_steps(database: Path) -> dict[str, set[int]]:
    """Return the sequence numbers of the steps of each launch that a database has."""
    stored: dict[str, set[int]] = {}
    with closing(sqlite3.connect(database)) as connection:
        for launch, sequence in connection.execute(
            "SELECT launch, sequence FROM steps JOIN attempts USING (run, attempt)"
        ):
            stored.setdefault(launch, set()).add(sequence)
    return stored


def partial_steps(database: Path) -> int:
    """Return how many steps a database has of some of their ranks only."""
    with closing(sqlite3.connect(database)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM steps WHERE ranks < ?", (RANKS,)).fetchone()
    return int(count)
