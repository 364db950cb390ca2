"""One rank as the recorder sees it: what its ring holds, what has been sent of it, and what to send next."""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from statistics import median

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.batches import BatchPacker, global_norm, hello, is_urgent
from foreshock_recorder.blocks import Piece
from foreshock_recorder.endings import ProcessEnd, exit_of
from foreshock_recorder.layout import ExitReason, NormHistory
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import ReadOutcome, Record

OBSERVE_SECONDS = 0.5
"""How long a measured record waits for the script to observe its loss."""
FIRST_OBSERVE_SECONDS = 5.0
"""The same for a rank's first record: a resumed script may only then pass its step number."""
_UNDER_WAY = 48
"""A record this far behind the newest is on no device any more: the probe stages fewer."""
_IN_FLIGHT = 4096
"""Records sent and not yet acknowledged at most; the others stay in the ring. A record that the ring had overwritten
before it was sent is not in flight."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 1.0, 30.0, 5.0
"""From a refusal to the next hello: the first, the longest, and the longest of a rank that has exited, for which the
recorder does not stay long."""
_PACE_STEPS = 32
"""Newest steps whose time is a rank's pace."""
_IDLE_SECONDS, _IDLE_STEPS, _MAX_IDLE_SECONDS = 30.0, 10, 300.0
"""How long a training may be idle before it counts as finished: so many seconds, or so many of its steps if that is
longer, within a limit. The collector reports a stall after twice as long at the earliest."""
_POLL_SECONDS = 0.25
_STATUS_SECONDS = 0.5
"""From the release of a process' locks to its exit status, at most."""


class Rank:
    """Follows one rank's ring. Times are monotonic seconds. Raises `ValueError` for a file that is no valid ring."""

    def __init__(self, path: Path) -> None:
        self.reader = RingReader(path)
        try:
            self._hello = hello(self.reader.identity, self.reader.pid)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.reader.close()
            raise ValueError(f"{path} has no valid identity: {error!r}") from error
        identity = self._hello.hello
        self.instance = identity.instance
        self.run = identity.run
        """Name that the rank asked for."""
        self.launch = (identity.run, identity.launch_id)
        """Ranks of the same launch send their records together."""
        self.number = identity.topology.rank
        self.refusal = ""
        """Why the collector of this stream refuses the rank; empty if it does not."""
        self._hello_sent = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        """From the next refusal to the hello after it."""
        self._packer = BatchPacker(
            identity.instance,
            rank=identity.topology.rank,
            layers=self.reader.layout.layers,
            local_norms="local_norms" in identity.capabilities,
        )
        self.acknowledged = self.reader.acknowledged
        self.delivered = False
        """True once the collector has stored every record, and the exit as well."""
        self._finished_at = math.inf
        """When it counts as finished if it is idle until then."""
        self._finished = False
        """Whether it counts as finished, though it may step again."""
        self._dead = False
        self._died = math.inf
        self._process_end: ProcessEnd | None = None
        self._polled = -math.inf
        self._events: dict[int, pb.Event] = {}
        self._errors = 0
        self._largest_norm = math.inf
        self._was_urgent = False
        self._measured_since: tuple[int, float] = (0, 0.0)
        self.restart_stream()

    @property
    def exited(self) -> bool:
        """True if no further record is expected."""
        return self.left or self._finished

    @property
    def left(self) -> bool:
        """True if no further record will be written."""
        return self.reader.exit_reason is not ExitReason.NONE

    @property
    def done(self) -> bool:
        """True if nothing is left to deliver, nor will be: also of a rank that was idle, stepped again and left."""
        return self.delivered and self.left and not self.unacknowledged

    @property
    def idle(self) -> bool:
        """True if another training of the rank's process steps, and this one may step again."""
        return self.reader.idle and not self.left

    @property
    def unacknowledged(self) -> int:
        """Records that the collector does not have."""
        return max(0, self.reader.begun - self.acknowledged)

    def fill_seconds(self) -> float:
        """Return how long the rank takes to overwrite its whole ring, by its newest records; Inf if unknown."""
        newest = self.reader.begun
        before = max(1, newest - _PACE_STEPS)
        first, last = self.reader.read(before), self.reader.read(newest)
        if before == newest or not (isinstance(first, Record) and isinstance(last, Record)):
            return math.inf
        seconds = max(0.0, last.monotonic_seconds - first.monotonic_seconds)
        return self.reader.layout.slot_count * seconds / (newest - before)

    @property
    def stack_path(self) -> Path:
        """File that a rank writes its stack to when it gets SIGTERM; it is empty before."""
        return self.reader.path.with_suffix(".stack")

    def watch_process(self) -> None:
        """Find out how the rank's process ends. Needs a running loop."""
        self._process_end = ProcessEnd(self.reader.pid, self.reader.process_start)

    def poll(self, now: float, *, all_asked: bool = False) -> None:
        """Show the rank that a recorder is there, or notice its death.

        all_asked: the recorder itself was asked to stop.
        """
        if self._dead or now - self._polled < _POLL_SECONDS:
            return
        self._polled = now
        self.reader.check()
        self._follow_idle(now)
        if self.reader.alive:
            self.reader.heartbeat(now)
            return
        self._died = min(self._died, now)
        if self._process_end is not None and self._process_end.pending and now - self._died < _STATUS_SECONDS:
            return
        self._dead = True
        # Asked after its death, so this is final.
        if self.reader.exit_reason is ExitReason.NONE:
            self.reader.write_exit(*self._exit(all_asked=all_asked))
        if self.reader.exit_reason is ExitReason.LOST:
            self._record_event(pb.Event.RANK_LOST, self.reader.exit_detail)

    def _follow_idle(self, now: float) -> None:
        if not self.reader.idle:
            self._finished_at = math.inf
            if self._finished:
                self._finished = self.delivered = self._exit_sent = False
        elif self._finished_at == math.inf:
            patience = max(_IDLE_SECONDS, min(_IDLE_STEPS * self._usual_step_seconds(), _MAX_IDLE_SECONDS))
            self._finished_at = now + patience
        else:
            self._finished = now >= self._finished_at

    def _usual_step_seconds(self) -> float:
        """Return the median time from one of the newest records to the next; 0.0 if unknown."""
        newest = self.reader.begun
        records = map(self.reader.read, range(max(1, newest - _PACE_STEPS), newest + 1))
        times = [record.monotonic_seconds for record in records if isinstance(record, Record)]
        return median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0

    def _exit(self, *, all_asked: bool) -> tuple[ExitReason, str]:
        if self.reader.idle:
            # What has ended the process is the end of the training that steps.
            return ExitReason.FINISHED, ""
        stack = self.stack_path
        return exit_of(
            None if self._process_end is None else self._process_end.status,
            out_of_memory=self._process_end is not None and self._process_end.out_of_memory,
            asked=stack.exists() and stack.stat().st_size > 0,
            all_asked=all_asked,
        )

    def close(self) -> None:
        """Close the ring; its file stays."""
        if self._process_end is not None:
            self._process_end.close()
        self.reader.close()

    def report_problem(self, text: str) -> None:
        """Write for the rank, while it lives, why nothing reaches the collector; empty: it does."""
        if not self._dead:
            self.reader.write_problem(text)

    def report_page(self, address: str) -> None:
        """Write for the rank, while it lives, where its run's page is."""
        if not self._dead and self.reader.page != address:
            self.reader.write_page(address)

    def refuse(self, reason: str, now: float, share: float) -> None:
        """Send nothing of this rank but a hello after a while, since the collector refuses it: its reason may pass.

        share: in [0, 1), chosen at random, so that the ranks of a fleet do not all ask at once.
        """
        self.refusal = reason
        self.report_problem(reason)
        if self._hello_sent:
            longest = _LAST_PAUSE_SECONDS if self.exited else _LONGEST_PAUSE_SECONDS
            self._hello_due = now + min(self._pause_seconds, longest) * (0.5 + share)
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
            self._hello_sent = False

    def restart_stream(self) -> None:
        """Prepare for a new stream: everything is sent again, from the position that the collector acknowledges."""
        self.refusal, self._hello_due = "", -math.inf
        self._hello_sent = self._hello_acknowledged = self._exit_sent = False
        self._unsent_events = set(self._events)
        self._sent_dropped: dict[str, int] = {}
        self._next = self.acknowledged + 1
        self._waiting: list[Record] = []
        self._in_flight: deque[tuple[int, int]] = deque()  # last sequence number and rows of each batch
        self._urgent = False
        self._flushed = -math.inf

    def acknowledge(self, position: pb.Ack.Position) -> int:
        """Take in what the collector has stored of this rank. Return how many records more than before."""
        before = self.acknowledged
        if self.refusal:
            self.restart_stream()
            self._hello_sent = True
        if not self._hello_acknowledged:
            # The collector is the authority: with another database it asks for all that the ring still holds.
            self._hello_acknowledged = True
            self._next = position.sequence + 1
        self.acknowledged = position.sequence
        if position.HasField("history") and not self._dead:
            known = position.history
            rate = known.learning_rate
            self.reader.write_history(NormHistory(known.mean, known.recent, known.deviation, known.count, rate))
        if position.notice and not self._dead and position.notice != self.reader.notice:
            self.reader.write_notice(position.notice)
        while self._in_flight and self._in_flight[0][0] <= position.sequence:
            self._in_flight.popleft()
        self.delivered = position.closed and self.exited and not self.unacknowledged
        self.reader.acknowledge(position.sequence, exited=self.delivered)
        if position.sequence > before:
            # Not with the hello alone: a rank whose records are refused would ask every second.
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        return max(0, self.acknowledged - before)

    def next_messages(self, now: float, *, interval: float, limit: int) -> list[pb.FromRecorder]:
        """Return what to send now, records as a batch of this rank alone.

        interval: seconds between batches that are not urgent; limit: records in a batch.
        """
        due = now - self._flushed >= interval
        messages = self.opening(now, due=due)
        if not self.accepted:
            return messages
        limit = min(limit, self._packer.max_rows)
        self.read_ahead(now, limit=limit)
        if self.pressing(limit) or (due and self.speaks):
            piece = self.take(now, limit=limit)
            passes = piece.backward_passes
            packed = self._packer.pack(piece.first_sequence, list(piece.records), piece.dropped, backward_passes=passes)
            messages.append(packed)
        return messages + self.closing()

    def opening(self, now: float, *, due: bool) -> list[pb.FromRecorder]:
        """Return what comes before the records: its hello, and what has happened to it. due: records are due."""
        if self.delivered or (not self._hello_sent and now < self._hello_due):
            return []
        self.reader.check()
        self._hello.hello.exited = self.exited
        messages = [] if self._hello_sent else [self._hello]
        self._hello_sent = True
        return messages if self.refusal else messages + self._new_events(due=due)

    def closing(self) -> list[pb.FromRecorder]:
        """Return its exit, once all records before it are sent."""
        if self._exit_sent or not self.exited or self._waiting or self._next <= self.reader.begun:
            return []
        self._exit_sent = True
        return [self._exit_message()]

    @property
    def accepted(self) -> bool:
        """True if the collector of this stream takes its records, and does not have all of them."""
        return self._hello_acknowledged and not (self.delivered or self.refusal)

    @property
    def speaks(self) -> bool:
        """True if there is something to send once it is due: records, or that the rank is alive."""
        return bool(self._waiting) or not self.exited

    def pressing(self, limit: int) -> bool:
        """Return whether what it has to send should not wait until it is due. limit: records that wait at most."""
        if self._waiting:
            return self.exited or self._urgent or len(self._waiting) >= limit
        return self.exited and self.reader.dropped != self._sent_dropped

    @property
    def read_up_to(self) -> int:
        """The highest sequence number that was sent or waits."""
        return self._next - 1

    def read_ahead(self, now: float, *, limit: int) -> None:
        """Read on from the ring, up to the first record that may still change. limit: records that wait at most."""
        exited = self.exited
        in_flight = sum(rows for _, rows in self._in_flight)
        while len(self._waiting) < limit and in_flight + len(self._waiting) < _IN_FLIGHT:
            # Asked before the record is read: what lies below is in it, or will never be.
            measured, begun = self.reader.measured, self.reader.begun
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
            if not exited and not is_final(record, begun=begun, measured=measured, waited=waited):
                return
            self._waiting.append(record)
            self._next += 1
            urgent = is_urgent(record, self._largest_norm)
            # Only the first of several is sent at once: a run that stays broken must not send each step by itself.
            self._urgent |= urgent and not self._was_urgent
            self._was_urgent = urgent

    def take(self, now: float, *, limit: int, up_to: float = math.inf) -> Piece:
        """Return what waits, for it to be sent. limit: records at most. up_to: the last sequence number."""
        count = min(limit, len(self._waiting))
        while count and self._waiting[count - 1].sequence > up_to:
            count -= 1
        records, self._waiting = self._waiting[:count], self._waiting[count:]
        first = records[0].sequence if records else self._next - len(self._waiting)
        if records:
            self._in_flight.append((records[-1].sequence, len(records)))
        dropped = self.reader.dropped
        piece = Piece(
            packer=self._packer,
            launch=self.launch,
            first_sequence=first,
            records=records,
            dropped=dropped,
            backward_passes=self.reader.backward_passes,
        )
        self.reader.check()  # again: since the last time, an overwritten header may have counted anything
        norms = [norm for norm in map(global_norm, records) if norm is not None and math.isfinite(norm)]
        self._largest_norm = max(norms, default=self._largest_norm)
        self._sent_dropped = dropped
        self._urgent = False
        self._flushed = now
        return piece

    def _new_events(self, *, due: bool) -> list[pb.FromRecorder]:
        errors = self.reader.dropped.get("probe_error", 0)
        if errors > self._errors and (due or not self._errors):
            self._errors = errors
            self._record_event(pb.Event.PROBE_ERROR, self.reader.last_error)
        messages = [pb.FromRecorder(event=self._events[kind]) for kind in sorted(self._unsent_events)]
        self._unsent_events.clear()
        return messages

    def _record_event(self, kind: pb.Event.Kind, detail: str) -> None:
        newest = self.reader.read(self.reader.begun)
        step = newest.step if isinstance(newest, Record) else 0
        self._events[kind] = pb.Event(
            instance=self.instance, kind=kind, step=step, wall_seconds=time.time(), detail=detail
        )
        self._unsent_events.add(kind)

    def _exit_message(self) -> pb.FromRecorder:
        return pb.FromRecorder(
            exit=pb.Exit(
                instance=self.instance,
                reason=pb.ExitReason.Name(self.reader.exit_reason if self.left else ExitReason.FINISHED),
                detail=self.reader.exit_detail,
                last_sequence=self.reader.begun,
            )
        )


def is_final(record: Record, *, begun: int, measured: int, waited: float) -> bool:
    """Return whether nothing will be added to this record while its rank lives.

    begun, measured: the newest such records of the ring, asked before the record was read. waited: seconds since it was
    first seen measured.
    """
    if record.measured is None:
        # Measured parts come in order: passed over, the probe has failed on it.
        return measured > record.sequence or begun - record.sequence >= _UNDER_WAY
    # Its loss, staged on the device, comes before the next record is measured.
    patience = FIRST_OBSERVE_SECONDS if record.sequence == 1 else OBSERVE_SECONDS
    return record.observed or measured > record.sequence or waited >= patience
