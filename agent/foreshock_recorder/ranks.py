"""One rank as the recorder knows it: what its ring holds, what was said about it, and what to say next."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.batches import Columns, global_norm, hello, troubled
from foreshock_recorder.endings import Ending, farewell_of
from foreshock_recorder.reader import ReadOutcome, Record, RingReader
from foreshock_recorder.ring import Farewell

OBSERVE_SECONDS = 0.5
"""How long a measured record waits for the script to tell its loss."""
FIRST_OBSERVE_SECONDS = 5.0
"""The same for a rank's first record: a resumed script may only then tell its step number."""
_UNDER_WAY = 48
"""A record this far behind the newest is on no device any more: the probe stages fewer."""
_IN_FLIGHT = 4096
"""Records sent and not yet acknowledged at most; the others stay in the ring. One that the ring had overwritten before
it was sent is not in flight."""
_LOOK_SECONDS = 0.25
_STATUS_SECONDS = 0.5
"""From the end of a process' locks to its exit status, at most."""


class Rank:
    """One rank's ring. Times are monotonic seconds. Raises `ValueError` for a file that is no ring of ours."""

    def __init__(self, path: Path) -> None:
        self.reader = RingReader(path)
        try:
            self._hello = hello(self.reader.identity, self.reader.pid)
        except (KeyError, TypeError, ValueError) as error:
            self.reader.close()
            raise ValueError(f"{path} does not say whose it is: {error!r}") from error
        said = self._hello.hello
        self.instance = said.instance
        self.run = said.run
        """Name that it asked for."""
        self.number = said.topology.rank
        self.refused = ""
        """Why this stream's collector takes nothing of it in."""
        self._columns = Columns(
            said.instance,
            rank=said.topology.rank,
            layers=self.reader.layout.layers,
            local_norms="local_norms" in said.capabilities,
        )
        self.acknowledged = self.reader.acknowledged
        self.closed = False
        """The collector has stored all there is, the goodbye too."""
        self._dead = False
        self._died = math.inf
        self._ending: Ending | None = None
        self._looked = -math.inf
        self._events: dict[int, pb.Event] = {}
        self._errors = 0
        self._largest_norm = math.inf
        self._in_trouble = False
        self._measured_since: tuple[int, float] = (0, 0.0)
        self.rewind()

    @property
    def gone(self) -> bool:
        """No further record will be written."""
        return self.reader.farewell is not Farewell.NONE

    @property
    def unstored(self) -> int:
        """Records that the collector does not have."""
        return max(0, self.reader.launched - self.acknowledged)

    @property
    def left_behind(self) -> Path:
        """Where a rank that is sent SIGTERM leaves its stack; the file is empty before."""
        return self.reader.path.with_suffix(".stack")

    def watch(self) -> None:
        """Find out how its process ends. Needs a running loop."""
        self._ending = Ending(self.reader.pid, self.reader.process_start)

    def look(self, now: float, *, all_asked: bool = False) -> None:
        """Show the rank that somebody is there; notice its death. all_asked: the recorder was told to stop."""
        if self.closed or self._dead or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self.reader.alive:
            self.reader.heartbeat(now)
            return
        self._died = min(self._died, now)
        if self._ending is not None and self._ending.pending and now - self._died < _STATUS_SECONDS:
            return
        self._dead = True
        # Asked after its death, so this is final.
        if self.reader.farewell is Farewell.NONE:
            self.reader.say_farewell(*self._farewell(all_asked=all_asked))
        if self.reader.farewell is Farewell.LOST:
            self._happened(pb.Event.RANK_LOST, self.reader.farewell_detail)

    def _farewell(self, *, all_asked: bool) -> tuple[Farewell, str]:
        stack = self.left_behind
        return farewell_of(
            None if self._ending is None else self._ending.status,
            out_of_memory=self._ending is not None and self._ending.out_of_memory,
            asked=stack.exists() and stack.stat().st_size > 0,
            all_asked=all_asked,
        )

    def close(self) -> None:
        """Let go of the ring; its file stays."""
        if self._ending is not None:
            self._ending.close()
        self.reader.close()

    def say_trouble(self, text: str) -> None:
        """Tell the process, if there is one, why nothing gets to the collector; empty: it does."""
        if not self._dead:
            self.reader.trouble(text)

    def say_page(self, address: str) -> None:
        """Tell the process where its run's page is."""
        if not self._dead and self.reader.page_address != address:
            self.reader.page(address)

    def refuse(self, trouble: str) -> None:
        """Say nothing more on this stream: it is not wanted."""
        self.refused = trouble
        self.say_trouble(trouble)

    def rewind(self) -> None:
        """A new stream begins: all is to be said again, from what the collector will answer to Hello."""
        self.refused = ""
        self._greeted = self._answered = self._said_goodbye = False
        self._untold = set(self._events)
        self._told_dropped: dict[str, int] = {}
        self._next = self.acknowledged + 1
        self._waiting: list[Record] = []
        self._sent: deque[tuple[int, int]] = deque()  # last sequence number and rows of each batch under way
        self._urgent = False
        self._flushed = -math.inf

    def stored(self, position: pb.Ack.Position) -> int:
        """The collector tells how far it has this rank. How many records more than before."""
        before = self.acknowledged
        if not self._answered:
            # It is the authority: with another database it asks for all that the ring still holds.
            self._answered = True
            self._next = position.sequence + 1
        self.acknowledged = position.sequence
        while self._sent and self._sent[0][0] <= position.sequence:
            self._sent.popleft()
        self.closed = position.closed and self.gone and not self.unstored
        self.reader.acknowledge(position.sequence, farewell=self.closed)
        return max(0, self.acknowledged - before)

    def messages(self, now: float, *, interval: float, limit: int) -> list[pb.FromRecorder]:
        """What to say now. interval: seconds between batches without trouble; limit: records in a batch."""
        if self.closed or self.refused:
            return []
        self._hello.hello.gone = self.gone
        said = [] if self._greeted else [self._hello]
        self._greeted = True
        due = now - self._flushed >= interval
        said += self._news(due=due)
        if not self._answered:
            return said
        gone = self.gone
        limit = min(limit, self._columns.most_rows)
        self._collect(now, limit=limit, gone=gone)
        dropped = self.reader.dropped
        enough = due or gone or self._urgent or len(self._waiting) >= limit
        if (self._waiting and enough) or (due and not gone) or (gone and dropped != self._told_dropped):
            said.append(self._flush(now, dropped, limit))
        if gone and not self._waiting and self._next > self.reader.launched and not self._said_goodbye:
            self._said_goodbye = True
            said.append(self._goodbye())
        return said

    def _collect(self, now: float, *, limit: int, gone: bool) -> None:
        """Read on from the ring, up to the first record that may still change."""
        under_way = sum(rows for _, rows in self._sent)
        while len(self._waiting) < limit and under_way + len(self._waiting) < _IN_FLIGHT:
            # Asked before the record is read: what lies below is in it, or will never be.
            measured, launched = self.reader.measured, self.reader.launched
            record = self.reader.read(self._next)
            if record is ReadOutcome.NOT_YET:
                return
            if isinstance(record, ReadOutcome):
                if self._waiting:
                    return  # a batch has no gaps: the next one begins behind this
                self._next = max(self._next + 1, self.reader.oldest)
                continue
            if record.measured is not None and self._measured_since[0] != record.sequence:
                self._measured_since = (record.sequence, now)
            waited = now - self._measured_since[1]
            if not gone and not settled(record, launched=launched, measured=measured, waited=waited):
                return
            self._waiting.append(record)
            self._next += 1
            trouble = troubled(record, self._largest_norm)
            # Only its beginning hurries: a run that stays broken must not send each step by itself.
            self._urgent |= trouble and not self._in_trouble
            self._in_trouble = trouble

    def _flush(self, now: float, dropped: dict[str, int], limit: int) -> pb.FromRecorder:
        records, self._waiting = self._waiting[:limit], self._waiting[limit:]
        first = records[0].sequence if records else self._next
        if records:
            self._sent.append((records[-1].sequence, len(records)))
        message = self._columns.pack(first, records, dropped, backward_passes=self.reader.backward_passes)
        norms = [norm for norm in map(global_norm, records) if norm is not None and math.isfinite(norm)]
        self._largest_norm = max(norms, default=self._largest_norm)
        self._told_dropped = dropped
        self._urgent = False
        self._flushed = now
        return message

    def _news(self, *, due: bool) -> list[pb.FromRecorder]:
        errors = self.reader.dropped.get("probe_error", 0)
        if errors > self._errors and (due or not self._errors):
            self._errors = errors
            self._happened(pb.Event.PROBE_ERROR, self.reader.note)
        news = [pb.FromRecorder(event=self._events[kind]) for kind in sorted(self._untold)]
        self._untold.clear()
        return news

    def _happened(self, kind: pb.Event.Kind, detail: str) -> None:
        newest = self.reader.read(self.reader.launched)
        step = newest.step if isinstance(newest, Record) else 0
        self._events[kind] = pb.Event(
            instance=self.instance, kind=kind, step=step, wall_seconds=time.time(), detail=detail
        )
        self._untold.add(kind)

    def _goodbye(self) -> pb.FromRecorder:
        goodbye = pb.Goodbye(
            instance=self.instance,
            reason=pb.Goodbye.Reason.Name(self.reader.farewell),
            detail=self.reader.farewell_detail,
            last_sequence=self.reader.launched,
        )
        return pb.FromRecorder(goodbye=goodbye)


def settled(record: Record, *, launched: int, measured: int, waited: float) -> bool:
    """Nothing will be added to this record while its rank lives.

    launched, measured: the newest such records of the ring, asked before the record was read. waited: seconds since it
    was first seen measured.
    """
    if record.measured is None:
        # Measured parts come in order: passed over, the probe has failed on it.
        return measured > record.sequence or launched - record.sequence >= _UNDER_WAY
    # Its loss, staged on the device, comes before the next record is measured.
    patience = FIRST_OBSERVE_SECONDS if record.sequence == 1 else OBSERVE_SECONDS
    return record.observed or measured > record.sequence or waited >= patience
