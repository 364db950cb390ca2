"""State of a run: takes records in, puts steps together, hands them to the judge.

Clocks come in as arguments. What happens between two commits gathers in `Run.changes`; what may be seen from outside
moves only in `Run.finalize_steps`, which is followed by a commit before anybody looks, so that counters never go back.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.catalogue import RUN_STAGES
from foreshock_collector.records.buffer import MOST_SEQUENCE, complete, decode
from foreshock_collector.records.steps import Step
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import PEACEFUL, Attempt, Instance
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.evaluator import Evaluator
from foreshock_collector.state.incidents import DEATH, SILENCE, Incidents
from foreshock_collector.state.totals import Totals
from foreshock_protos.v1 import telemetry_pb2 as pb

EVENTS_KEPT = 200
"""Of a run, at hand; the store has them all."""
_CLOCK_SECONDS = 5.0
"""Clocks that differ by more do not tell which of two ranks left first."""
_SUPERSEDED_SECONDS = 60.0
"""An attempt that another has followed, and that is silent for so long, has nothing more to say."""
_LIVE_SECONDS = 10.0
"""A rank that was heard of within it lives: its recorder has much to say each second, or that it is there."""


class ContradictionError(ValueError):
    """What an instance says does not fit what is known of it."""


@dataclass
class Changes:
    """What a commit has to store of a run."""

    attempts: list[Attempt] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    batches: list[tuple[Instance, pb.StepBatch]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    incidents: dict[int, dict[str, Any]] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)
    """The records before an incident, by its number."""


class Run:
    """One run, over all its attempts."""

    def __init__(self, experiment: str, name: str, rules: Rules = DEFAULT) -> None:
        self.experiment = experiment
        self.name = name
        self.rules = rules
        self.errors = Errors(f"run {name!r}", RUN_STAGES)
        """The collector's own, in this run."""
        self.attempts: list[Attempt] = []
        self.totals = Totals()
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.incidents = Incidents(self.totals, self._keep_incident)
        self._evaluator = Evaluator(
            rules, self.totals, self.incidents, self.events, record=self._record, keep=self._keep_window
        )
        self.watched_since = 0.0
        """Silence counts from here: before the newest attempt, or while the collector was away, nobody could report."""
        self.changes: Changes | None = None
        """None: nothing has happened since the last commit."""
        self.unexplained = True
        """Ranks may have left, and of what is not said yet: that is judged later, though nothing more comes of them."""
        self._missing: Counter[str] = Counter()
        """Dropped records that were learnt of since the last commit."""

    def changed(self) -> Changes:
        """To be stored by the next commit."""
        if self.changes is None:
            self.changes = Changes()
        return self.changes

    # -- in ------------------------------------------------------------------------------------------------------

    def register(self, hello: pb.Hello, now: float) -> Instance:
        """A new instance says hello. Raises `ContradictionError`."""
        attempt = next((a for a in self.attempts if a.launch == hello.launch), None)
        place = hello.topology
        if attempt is None:
            attempt = Attempt(len(self.attempts), hello, self.rules)
            if self.attempts and not hello.gone:
                attempt.started_seconds = max(attempt.started_seconds, self.newest.started_seconds)
            self.attempts.append(attempt)
            self.watched_since = now
            self.changed().attempts.append(attempt)
        elif place.world_size != attempt.world_size:
            raise ContradictionError(
                f"world_size {place.world_size}: this launch has told of {attempt.world_size} ranks before"
            )
        elif place.rank in attempt.instances:
            raise ContradictionError(f"rank {place.rank} of this launch is another instance already")
        instance = Instance(
            name=hello.instance,
            attempt=attempt,
            rank=place.rank,
            local_rank=place.local_rank,
            node=place.node,
            pid=hello.pid,
            layers=len(hello.model.layers),
            last_report=now,
            gone=hello.gone,
        )
        attempt.instances[place.rank] = instance
        self.changed().instances[instance.name] = instance
        return instance

    def heartbeat(self, instance: Instance, now: float) -> None:
        """It is alive."""
        instance.last_report = now
        if instance.attempt.silent:
            instance.attempt.silent = False
            self.incidents.close(instance.attempt, SILENCE, now)
        self.changed().instances[instance.name] = instance

    def ingest(self, instance: Instance, batch: pb.StepBatch, now: float) -> Iterator[int]:
        """Records of one instance: those it had sent before are left out, a gap is counted. Raises `ColumnsError`.

        Yields a sequence number where steps up to it have to be settled, and committed, to make room for the rest.
        """
        records = decode(batch, instance.layers)
        self.heartbeat(instance, now)
        instance.backward_passes = max(instance.backward_passes, min(batch.backward_passes, MOST_SEQUENCE))
        for reason, count in batch.dropped.items():
            # Cumulative since the attach: only what is new counts, however often it is told.
            if reason in self.totals.dropped:
                before = instance.dropped.get(reason, 0)
                self._missing[reason] += max(0, count - before)
                instance.dropped[reason] = max(count, before)
        records = records.above(instance.position)
        if not len(records):
            return
        self.changed().batches.append((instance, batch))
        buffer = instance.attempt.buffer
        for piece in records.slices(buffer.capacity // 2):
            if (room := buffer.room(piece)) > buffer.finalized:
                yield room
            self._missing["ring_overrun"] += int(piece.rows["sequence"][0]) - instance.position - 1
            self._missing["never_finished"] += int((~complete(piece.rows)).sum())
            instance.attempt.write(instance, piece, now)
            instance.update(piece)
            self.changed().instances[instance.name] = instance

    def keep(self, instance: Instance, batch: pb.StepBatch) -> None:
        """Store and acknowledge records, though something went wrong with them."""
        changes, last = self.changed(), batch.first_sequence + len(batch.step) - 1
        if not any(kept is batch for _, kept in changes.batches):
            changes.batches.append((instance, batch))
        instance.position = max(instance.position, last)
        changes.instances[instance.name] = instance

    def record_event(self, instance: Instance, event: pb.Event, now: float) -> None:
        """Something happened to a rank. Told again after each reconnect: one of a kind is kept."""
        self.heartbeat(instance, now)
        kind = pb.Event.Kind.Name(event.kind).lower()
        if kind not in instance.told:
            instance.told.append(kind)
            if event.kind == pb.Event.RANK_LOST:
                # Its goodbye says so as well, but only behind its last records.
                instance.detail = instance.detail or event.detail
                # The recorder's clock tells which was first; one that is wrong does not.
                instance.left_seconds = event.wall_seconds if abs(event.wall_seconds - now) < _CLOCK_SECONDS else now
            who = {"rank": instance.rank, "instance": instance.name, "detail": event.detail}
            self._record({"kind": kind, "attempt": instance.attempt.number, "step": event.step, **who}, now)

    def close(self, instance: Instance, goodbye: pb.Goodbye, now: float) -> None:
        """It has left; what is missing up to its last record will not come."""
        self.heartbeat(instance, now)
        if instance.closed:
            return
        if goodbye.last_sequence > instance.position:
            self._missing["ring_overrun"] += goodbye.last_sequence - instance.position
            instance.position = goodbye.last_sequence
        instance.leaving = pb.Goodbye.Reason.Name(goodbye.reason)
        instance.detail = goodbye.detail
        if instance.leaving not in PEACEFUL:
            instance.left_seconds = instance.left_seconds or now

    # -- steps ---------------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> bool:
        """A step that is not finite, or that lacks a rank, has waited long enough."""
        return any(not attempt.evicted and attempt.buffer.overdue(now) for attempt in self.attempts)

    def finalize_steps(self, now: float, *, attempt: Attempt | None = None, at_least: int = 0) -> None:
        """Take all that is due to the judge. at_least: of this attempt, settle up to here in any case."""
        for each in self.attempts:
            newest = each is self.newest
            each.past = self._is_past(each)
            if not each.evicted:
                steps = self._assemble(each, max(each.due(now), at_least if each is attempt else 0))
                self._judge_steps(each, steps, now, newest=newest)
            with self.errors.caught("judge"):
                self._evaluator.check_departures(each, now)
            with self.errors.caught("judge"):
                if newest:
                    self._evaluator.check_stall(each, now, since=self.watched_since)
            for instance in each.instances.values():
                if instance.leaving:
                    instance.closed, instance.leaving = instance.leaving, ""
            if each.over and each.departures_checked == len(each.departures()):
                # A death is over only once a later attempt goes on.
                self.incidents.close_all(each, now, but=(DEATH, SILENCE))
            if not newest and each.idle and now - each.last_heard() > _SUPERSEDED_SECONDS:
                # It need not have left, as when its machine has vanished.
                self.incidents.close_all(each, now, but=(DEATH, SILENCE))
                each.evict()
        for each in self.attempts:
            # Training goes on since; or it has been started again before anybody could be told.
            if self._is_past(each):
                self.incidents.close(each, DEATH, now)
                self.incidents.close(each, SILENCE, now)
        self.unexplained = any(each.departures_checked != len(each.departures()) for each in self.attempts)
        self.totals.add_dropped(self._missing)
        self._missing.clear()

    def _is_past(self, attempt: Attempt) -> bool:
        return attempt is not self.newest and bool(self.newest.finalized or attempt.handed_in)

    def fall_silent(self, now: float, silent_seconds: float) -> None:
        """Nobody has heard of the run for so long, and it never left."""
        attempt = self.newest
        if not attempt.silent and not attempt.over and not self.active(now, silent_seconds):
            attempt.silent = True
            self.changed()
            self._evaluator.check_silence(attempt, now, silent_seconds)

    def _assemble(self, attempt: Attempt, upto: int) -> list[Step]:
        """Every step that can be: history has no hole behind one that cannot."""
        steps: list[Step] = []
        position = -1
        while position < attempt.finalized:
            position = attempt.finalized
            with self.errors.caught("judge"):
                for step in attempt.assemble(upto):
                    steps.append(step)  # noqa: PERF402 - what came before an error is kept
        if steps:
            self.changed().steps.extend(steps)
        return steps

    def _judge_steps(self, attempt: Attempt, steps: list[Step], now: float, *, newest: bool) -> None:
        """An error ends what was known of the attempt: judging begins anew with the next step."""
        try:
            for step in steps:
                self.totals.add_step(step, now, newest=newest)
            self._evaluator.steps(attempt, steps, now)
        except Exception as error:
            self.errors.add("judge", error)
            with self.errors.caught("judge"):
                # That ranks have died is no matter of steps.
                self.incidents.close_all(attempt, now, but=(DEATH, SILENCE))
            attempt.forget(but=(DEATH, SILENCE))

    def _record(self, event: dict[str, Any], now: float) -> None:
        event = {**event, "seen_seconds": now}
        self.events.append(event)
        self.changed().events.append(event)

    def _keep_incident(self, incident: dict[str, Any]) -> None:
        self.changed().incidents[incident["id"]] = incident

    def _keep_window(self, incident: int, window: Window) -> None:
        self.changed().windows[incident] = window

    @property
    def evicted(self) -> bool:
        """Nothing of it is at hand but what counts, and nothing is open: a run may die before its first record."""
        return not self.unexplained and all(attempt.evicted and not attempt.incidents for attempt in self.attempts)

    def evict(self, now: float) -> None:
        """The run has ended: let go of all that the store can do without."""
        for attempt in self.attempts:
            self.incidents.close_all(attempt, now)
            attempt.evict()

    # -- out -----------------------------------------------------------------------------------------------------

    @property
    def newest(self) -> Attempt:
        """The attempt that started last: after an outage, an older one may be heard of later."""
        return max(self.attempts, key=lambda attempt: (attempt.started_seconds, attempt.number))

    def stall_after(self) -> float:
        """Seconds without a step that mean a stall, of the newest attempt."""
        return self.totals.stall_after(self.newest.finalized)

    def last_heard(self) -> float:
        """When any rank last reported."""
        return max((attempt.last_heard() for attempt in self.attempts), default=0.0)

    def has_live_ranks(self, now: float) -> bool:
        """A rank has been heard of just now, and may still write records."""
        return any(
            now - instance.last_report < _LIVE_SECONDS
            for attempt in self.attempts
            for instance in attempt.instances.values()
            if not (instance.ended or instance.gone or instance.left_seconds)
        )

    def active(self, now: float, silent_seconds: float) -> bool:
        """A rank of the newest attempt has not left, and has been heard of lately."""
        # A collector that starts gives each run time to be heard of again, but none that was silent before.
        return not self.newest.silent and any(
            not instance.closed and now - max(instance.last_report, self.watched_since) < silent_seconds
            for instance in self.newest.instances.values()
        )

    def ended_for(self, now: float, silent_seconds: float) -> float:
        """Seconds since it ended, by a goodbye or by silence; 0 while it is active."""
        if self.active(now, silent_seconds):
            return 0.0
        if self.newest.over:
            return max(0.0, now - self.last_heard())
        since = self.last_heard() if self.newest.silent else max(self.last_heard(), self.watched_since)
        return max(0.0, now - since - silent_seconds)

    def snapshot(self) -> dict[str, Any]:
        """All that must survive beside the tables, as JSON."""
        return {
            "experiment": self.experiment,
            "attempts": [attempt.state() for attempt in self.attempts],
            "totals": self.totals.state(),
            "errors": self.errors.counts,
        }

    def bare_snapshot(self) -> dict[str, Any]:
        """The least of it: where all of it cannot be stored, the run is found again all the same."""
        return {"experiment": self.experiment, "attempts": [], "totals": Totals().state(), "errors": self.errors.counts}

    @classmethod
    def restored(cls, name: str, snapshot: dict[str, Any], hellos: list[pb.Hello], rules: Rules = DEFAULT) -> Run:
        """A run as it was when `snapshot` was taken; instances, events, incidents, steps and records follow."""
        run = cls(snapshot["experiment"], name, rules)
        # Of an attempt whose state could not be stored there is only its hello.
        for number, (hello, state) in enumerate(zip_longest(hellos, snapshot["attempts"])):
            run.attempts.append(Attempt(number, hello, rules, state))
        run.totals.restore(snapshot["totals"])
        run.errors.counts |= snapshot["errors"]
        return run

    def restore(self, instance: Instance, batch: pb.StepBatch, now: float) -> None:
        """Put stored records back: as evidence if their step is settled, else among those that wait."""
        buffer = instance.attempt.buffer
        for piece in decode(batch, instance.layers).slices(buffer.capacity // 2):
            if buffer.room(piece) <= buffer.finalized:
                buffer.write(instance.rank, piece, now)
