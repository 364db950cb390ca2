"""Copies what the ring of rank 0 holds into experiment tools, at most once a second.

It reads the ring as the recorder does, so it waits neither for a device nor for a collector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from foreshock._log import warn_once
from foreshock._mirror import mlflow, tensorboard, trackio, wandb
from foreshock._mirror.tool import LOSS, NORM, PREFIX, Find, OpenRun, size
from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder.layout import GRADIENT_UNKNOWN, RingFile
from foreshock_recorder.records import Record, read_record

NOTICES = "notice"
"""What a rank that mirrors asks the collector for."""
FINDS: Mapping[str, Find] = {
    "tensorboard": tensorboard.find,
    "wandb": wandb.find,
    "mlflow": mlflow.find,
    "trackio": trackio.find,
}
"""How to find the open run of each tool."""
INTERVAL_SECONDS = 1.0
_MOST_RECORDS = 100
"""Records of one look, which take some ten microseconds each."""
_LONGEST_WAIT_SECONDS = 64.0
"""Between two searches for a run that is not open yet: the one for a `SummaryWriter` goes through all objects."""
_GLOBAL_NORM, _CLIP_COEFFICIENT = map(MEASURED_NAMES.index, ("global_norm", "clip_coefficient"))


class Mirror:
    """Writes a rank's records, the run's page and what the collector says of the run into each tool."""

    def __init__(self, tools: Iterable[str]) -> None:
        """tools: of `FINDS`."""
        self._tools = [_Tool(name) for name in tools]
        self._looked = -math.inf
        self._newest = 0
        """Sequence number of the newest record that was looked at."""

    def update(self, ring: RingFile, now: float) -> None:
        """Look at the ring, unless the last look was less than a second ago. now: monotonic seconds."""
        if now - self._looked >= INTERVAL_SECONDS:
            self._looked = now
            self._look(ring)

    def close(self, ring: RingFile) -> None:
        """Look a last time, since the rank leaves: the collector may have said why."""
        self._look(ring, leaves=True)

    def _look(self, ring: RingFile, *, leaves: bool = False) -> None:
        newest = ring.measured
        record = largest(_records(ring, self._newest, newest))
        self._newest = newest
        for tool in self._tools:
            tool.update(record, notice=ring.notice, page=ring.page, now=self._looked, leaves=leaves)


class _Tool:
    """Follows the open run of one tool. A tool that fails is left alone from then on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._run: OpenRun | None = None
        self._failed = False
        self._next_search, self._wait = -math.inf, INTERVAL_SECONDS
        self._notice = self._page = ""

    def update(self, record: Record | None, *, notice: str, page: str, now: float, leaves: bool) -> None:
        """Write what is new. record: of one step; None without a new one. now: monotonic seconds."""
        if self._failed:
            return
        try:
            run = self._open_run(now)
            if run is None:
                return
            if record is not None and (values := numbers(record)):
                run.write(record.step, values)
            if page != self._page:
                self._page = page
                run.link(page)
            if notice != self._notice:
                self._notice = notice
                run.notify(notice)
            if leaves:
                run.flush()
        except Exception as error:
            self._failed = True
            warn_once(f"mirror {self._name}", f"{self._name} is no longer mirrored: {type(error).__name__}: {error}")

    def _open_run(self, now: float) -> OpenRun | None:
        if self._run is not None and self._run.closed:
            self._run, self._notice, self._page = None, "", ""
            self._next_search, self._wait = now, INTERVAL_SECONDS
        if self._run is None and now >= self._next_search:
            self._run = FINDS[self._name]()
            self._next_search, self._wait = now + self._wait, min(2 * self._wait, _LONGEST_WAIT_SECONDS)
            if self._run is None and self._wait == _LONGEST_WAIT_SECONDS:
                line = f"{self._name} has no open run on rank 0, so it is not mirrored yet"
                warn_once(f"mirror {self._name}", line)
        return self._run


def _records(ring: RingFile, after: int, newest: int) -> Iterator[Record]:
    """Yield the measured records that are newer than `after`, the newest `_MOST_RECORDS` of them."""
    for sequence in range(max(after, newest - _MOST_RECORDS) + 1, newest + 1):
        record = read_record(ring, sequence)
        if isinstance(record, Record) and record.measured is not None:
            yield record


def largest(records: Iterable[Record]) -> Record | None:
    """Return the record with the largest global norm, the newest of several."""
    return max(records, key=lambda record: (size(numbers(record)), record.sequence), default=None)


def numbers(record: Record) -> dict[str, float]:
    """Return what the tools show of a record, by name."""
    values = {f"{PREFIX}learning_rate": record.learning_rate}
    if record.loss is not None:
        values[LOSS] = record.loss
    if record.measured is not None and not record.flags & GRADIENT_UNKNOWN:
        values[NORM] = record.measured[_GLOBAL_NORM]
        values[f"{PREFIX}clip_coefficient"] = record.measured[_CLIP_COEFFICIENT]
    return values
