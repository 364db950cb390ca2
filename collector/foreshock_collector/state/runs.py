"""State of a run: ingests records, finalizes steps, hands them to the evaluator.

Clocks come in as arguments. What is visible from outside changes only when steps are finalized, and is committed before
anyone can read it, so counters never go back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.catalogue import RUN_STAGES
from foreshock_collector.records.batch import MAX_SEQUENCE, complete, decode
from foreshock_collector.records.block import Block, decode_block
from foreshock_collector.records.steps import Step
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.evaluator import Evaluator
from foreshock_collector.state.events import Events
from foreshock_collector.state.incidents import DEATH, SILENCE, Incidents
from foreshock_collector.state.instances import Instance, InstanceState, note_records
from foreshock_collector.state.run_state import Members, Received, RunState, Unsaved, received
from foreshock_collector.state.totals import Totals
from foreshock_protos.v1 import telemetry_pb2 as pb

_SUPERSEDED_SECONDS = 60.0
"""An attempt that another has followed, and that is silent for so long, will not report any more."""
LIVE_SECONDS = 10.0
"""A rank that reported within it is live: its recorder reports every second."""
_MOST_GAPS = 64
"""Gaps in the records of a rank that may still be filled: one that leaves out every other record has no more."""
_KEPT_OPEN = (DEATH, SILENCE)
"""Incidents of ranks and not of steps: they close only when a later attempt makes steps, or the run is evicted."""


class ContradictionError(ValueError):
    """An instance reports something that contradicts what is known about it."""


class Run:
    """Follows one run over all its attempts."""

    def __init__(self, experiment: str, name: str, rules: Rules = DEFAULT, totals: Totals | None = None) -> None:
        self.experiment = experiment
        self.name = name
        self.host = ""
        """Address of the machine that began it, since the collector's start; empty if none has reported since."""
        self.rules = rules
        self.errors = Errors(f"run {name!r}", RUN_STAGES)
        """Internal errors in this run."""
        self.attempts: list[Attempt] = []
        self.totals = totals or Totals()
        self.events = Events()
        self.incidents = Incidents(self.totals)
        self._evaluator = Evaluator(rules, self.totals, self.incidents, self.events)
        self.watched_since = 0.0
        """Silence counts from here: before the newest attempt, or while the collector was away, nobody could report."""
        self.unsaved = Unsaved()
        self.departures_pending = True
        """Whether ranks may have left that are not explained yet: that comes later, without another record of them."""
        self.evidence: list[Callable[[], None]] = []
        """Load records of finalized steps that a start has left in the store: each once, before they may be needed."""
        self._missing: Counter[str] = Counter()
        """Dropped records that were learned of since the last commit."""

    # -- in ------------------------------------------------------------------------------------------------------

    def register(self, hello: pb.Hello, now: float) -> Instance:
        """Add a new instance, and its attempt where it is the first. Raises `ContradictionError`."""
        attempt = next((a for a in self.attempts if a.launch == hello.launch_id), None)
        place = hello.topology
        if attempt is None:
            public = pb.Hello()
            public.CopyFrom(hello)
            public.ClearField("token")
            attempt = Attempt(len(self.attempts), public)
            if self.attempts and not hello.exited:
                attempt.started_seconds = max(attempt.started_seconds, self.newest.started_seconds)
            self.attempts.append(attempt)
            self.watched_since = now
            self.unsaved.attempts.append(attempt)
        elif place.world_size != attempt.world_size:
            raise ContradictionError(
                f"world_size {place.world_size}: this launch has reported {attempt.world_size} ranks before"
            )
        elif place.rank in attempt.instances:
            raise ContradictionError(f"rank {place.rank} of this launch is another instance already")
        instance = attempt.instances[place.rank] = Instance(
            InstanceState.from_hello(hello, attempt.number, now), gone=hello.exited
        )
        self.unsaved.instances[instance.name] = instance
        return instance

    def heartbeat(self, instance: Instance, now: float) -> None:
        """Record that the instance is alive."""
        instance.last_report = now
        attempt = self.attempts[instance.attempt]
        if attempt.silent:
            attempt.silent = False
            self.incidents.close(attempt, SILENCE, now)
        self.unsaved.instances[instance.name] = instance

    def ingest(self, instance: Instance, batch: pb.StepBatch, now: float) -> bool:
        """Ingest records of an instance. Records that it sent before are ignored.

        Return True if steps were finalized to make room, and must be committed before anyone reads the state.
        Raises `ColumnsError`.
        """
        records = decode(batch, instance.layers)
        self._note_report(instance, batch, now)
        records = records.above(instance.position, instance.gaps)
        if not len(records):
            return False
        self.unsaved.received.append(received(instance, batch))
        return self._add([instance], Block.of_records(records), now)

    def ingest_block(self, members: Members, block: pb.StepBlock, now: float) -> bool:
        """Ingest records of several instances of one attempt, as `ingest` does."""
        content = decode_block(block, members[0][1].layers)
        for place, instance in members:
            self._note_report(instance, block.ranks[place], now)
        new, finalized = _new_records(members, content) if len(content) else [], False
        if new:
            self.unsaved.received.append(received(members[0][1], block))
        for instances, part in new:
            finalized |= self._add(instances, part, now)
        return finalized

    def _note_report(self, instance: Instance, report: pb.StepBatch | pb.StepBlock.Rank, now: float) -> None:
        self.heartbeat(instance, now)
        instance.backward_passes = max(instance.backward_passes, min(report.backward_passes, MAX_SEQUENCE))
        if report.dropped:
            self._missing.update(instance.newly_dropped(report.dropped))

    def _add(self, instances: Sequence[Instance], block: Block, now: float) -> bool:
        """Add new records, and finalize steps where they need the room. Return whether any were."""
        attempt, finalized = self.attempts[instances[0].attempt], False
        if any(instance.ended == "FINISHED" for instance in instances):
            self._reopen(attempt, now)
        buffer = attempt.buffer
        for piece in block.slices(buffer.capacity // 2):
            if (room := buffer.must_finalize(int(piece.sequences[-1]))) > buffer.finalized:
                finalized = True
                with self.errors.caught("evaluate"):
                    self.finalize_steps(now, attempt=attempt, at_least=room)
            self._missing["never_finished"] += int((~complete(piece.rows)).sum())
            attempt.write(instances, piece, now)
            note_records(instances, piece)
            for instance in instances:
                if len(instance.gaps) > _MOST_GAPS:
                    self._missing["ring_overrun"] += instance.lost_up_to(instance.gaps[-_MOST_GAPS][0] - 1)
        if finalized:
            self._count_late(attempt, now)
        return finalized

    def _count_late(self, attempt: Attempt, now: float) -> None:
        """Count what is known only in memory of records that are about to be committed."""
        self._revise_steps(attempt, now)
        self.totals.add_dropped(self._missing)
        self._missing.clear()

    def _reopen(self, attempt: Attempt, now: float) -> None:
        """Note that a training that counted as finished steps again: on all its ranks, which take steps together."""
        self.unsaved.instances |= {instance.name: instance for instance in attempt.reopen()}
        # It was expected to be silent until now.
        self.watched_since = now

    def accept_unprocessed(self, instances: Sequence[Instance], kept: Received, now: float) -> None:
        """Have records stored and acknowledged although an error kept them from being ingested."""
        if not any(each.message is kept.message for each in self.unsaved.received):
            self.unsaved.received.append(kept)
        for instance in instances:
            instance.position = max(instance.position, kept.last_sequence)
            self.unsaved.instances[instance.name] = instance
        self._count_late(self.attempts[kept.attempt], now)

    def record_event(self, instance: Instance, event: pb.Event, now: float) -> None:
        """Record an event of a rank. It is reported again after each reconnect: one of a kind is recorded."""
        self.heartbeat(instance, now)
        if (recorded := instance.record_event(event, now)) is not None:
            self.events.add(recorded)

    def close(self, instance: Instance, exit_message: pb.Exit, now: float) -> None:
        """Record that the instance has left: what is missing up to its last record will not come."""
        self.heartbeat(instance, now)
        self._missing["ring_overrun"] += instance.close(exit_message, now)

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time by the collector's clock, which was set."""
        self.watched_since += seconds
        self.totals.move_clock(seconds)
        for attempt in self.attempts:
            attempt.move_clock(seconds)

    # -- steps ---------------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> bool:
        """Whether a step that is not finite, or that lacks a rank, has waited long enough."""
        return any(not attempt.evicted and attempt.buffer.overdue(now) for attempt in self.attempts)

    def finalize_steps(self, now: float, *, attempt: Attempt | None = None, at_least: int = 0) -> None:
        """Finalize and evaluate all steps that are due. at_least: of this attempt, up to here in any case."""
        for each in self.attempts:
            newest = each is self.newest
            each.superseded = self._is_superseded(each)
            if not each.evicted:
                steps = self._assemble(each, max(each.due(now), at_least if each is attempt else 0))
                self._evaluate_steps(each, steps, now, newest=newest)
                self._revise_steps(each, now)
            pending = each.departures_pending
            with self.errors.caught("evaluate"):
                self._evaluator.check_departures(each, now)
            if pending and not each.departures_pending:
                # The attempt's outcome is known now, though perhaps without an incident.
                self.unsaved.instances |= {instance.name: instance for instance in each.instances.values()}
            with self.errors.caught("evaluate"):
                if newest:
                    self._evaluator.check_stall(each, now, since=self.watched_since)
            for instance in each.instances.values():
                if lost := instance.lost_up_to(each.finalized):
                    self._missing["ring_overrun"] += lost
                    self.unsaved.instances[instance.name] = instance
                if instance.leaving:
                    instance.closed, instance.leaving = instance.leaving, ""
                    self.unsaved.instances[instance.name] = instance
            if each.over and not each.departures_pending:
                self.incidents.close_all(each, now, keep_open=_KEPT_OPEN)
            if not newest and each.idle and now - each.last_report() > _SUPERSEDED_SECONDS:
                # Its ranks need not have exited: their machine may have failed.
                self.incidents.close_all(each, now, keep_open=_KEPT_OPEN)
                each.evict()
        for each in self.attempts:
            # Training has continued since, or was restarted before anyone could be alerted.
            if self._is_superseded(each):
                for key in _KEPT_OPEN:
                    self.incidents.close(each, key, now)
        self.departures_pending = any(each.departures_pending for each in self.attempts)
        self.totals.add_dropped(self._missing)
        self._missing.clear()

    def _is_superseded(self, attempt: Attempt) -> bool:
        return attempt is not self.newest and bool(self.newest.finalized or attempt.handed_in)

    def check_silence(self, now: float, silent_seconds: float) -> None:
        """Record whether the run has not reported for so long, though it never left."""
        attempt = self.newest
        if not attempt.silent and not attempt.over and not self.active(now, silent_seconds):
            attempt.silent = True
            self.unsaved.instances |= {instance.name: instance for instance in attempt.instances.values()}
            self._evaluator.check_silence(attempt, now, silent_seconds)

    def _assemble(self, attempt: Attempt, upto: int) -> list[Step]:
        """Every step that can be put together: history has no hole behind one that cannot."""
        steps: list[Step] = []
        position = -1
        while position < attempt.finalized:
            position = attempt.finalized
            with self.errors.caught("evaluate"):
                for step in attempt.assemble(upto):
                    steps.append(step)  # noqa: PERF402 - what came before an error is kept
        self.unsaved.steps += steps
        return steps

    def _evaluate_steps(self, attempt: Attempt, steps: list[Step], now: float, *, newest: bool) -> None:
        """Evaluate steps; after an error, detection restarts with the next one."""
        try:
            if steps and steps[0].sequence == 1:
                before = self.before(attempt)
                if before is not None:
                    attempt.resume(before, steps[0].step, self.rules)
            for step in steps:
                self.totals.add_step(step, now, newest=newest)
            self._evaluator.steps(attempt, steps, now)
        except Exception as error:
            self.errors.add("evaluate", error)
            with self.errors.caught("evaluate"):
                self.incidents.close_all(attempt, now, keep_open=_KEPT_OPEN)
            attempt.reset_detection(keep_open=_KEPT_OPEN)

    def _revise_steps(self, attempt: Attempt, now: float) -> None:
        """Count what is not finite of steps by records that came after these were finalized."""
        with self.errors.caught("evaluate"):
            for step, found in attempt.revised_steps():
                self.totals.add_nonfinite(found, now)
                self.unsaved.steps.append(step)

    @property
    def evicted(self) -> bool:
        """Whether its records are in the store alone and nothing is open: a run may die before its first record."""
        return not self.departures_pending and all(a.evicted and not a.incidents for a in self.attempts)

    @property
    def over(self) -> bool:
        """Whether it has ended, nothing of it is open, and the store has all of it."""
        ended = self.newest.over or self.newest.silent
        idle = all(a.evicted and not (a.incidents or a.departures_pending) for a in self.attempts)
        return ended and idle and not self.changed

    def evict(self, now: float) -> None:
        """Free all that the store can do without: the run has ended."""
        for attempt in self.attempts:
            self.incidents.close_all(attempt, now)
            attempt.evict()

    # -- out -----------------------------------------------------------------------------------------------------

    def before(self, attempt: Attempt) -> Attempt | None:
        """The attempt before this one. A launch that died before its first step is none."""
        return next((each for each in reversed(self.attempts[: attempt.number]) if each.finalized), None)

    @property
    def newest(self) -> Attempt:
        """The attempt that started last: after an outage, an older one may report later."""
        return max(self.attempts, key=lambda attempt: (attempt.started_seconds, attempt.number))

    def norms_before(self, instance: Instance) -> pb.NormHistory:
        """Return the history that the rank of this instance continues: of the attempt before. Count 0: none."""
        before = self.before(self.attempts[instance.attempt])
        return pb.NormHistory() if before is None else before.norm_history(self.rules)

    def stall_threshold(self) -> float:
        """Seconds without a step that mean a stall of the newest attempt."""
        return self.totals.stall_threshold(self.newest.finalized)

    def last_report(self) -> float:
        """When any rank last reported."""
        return max((attempt.last_report() for attempt in self.attempts), default=0.0)

    def has_live_ranks(self, now: float) -> bool:
        """Whether a rank has just reported, and may still write records."""
        return any(
            now - instance.last_report < LIVE_SECONDS
            for attempt in self.attempts
            for instance in attempt.instances.values()
            if not (instance.ended or instance.gone or instance.left_seconds)
        )

    def active(self, now: float, silent_seconds: float) -> bool:
        """Whether a rank of the newest attempt has not left, and has reported lately."""
        # A collector that starts gives each run time to report again, but none that was silent before.
        return not self.newest.silent and any(
            not instance.closed and now - max(instance.last_report, self.watched_since) < silent_seconds
            for instance in self.newest.instances.values()
        )

    def ended_for(self, now: float, silent_seconds: float) -> float:
        """Seconds since it ended, by an exit or by silence; 0 while it is active."""
        if self.active(now, silent_seconds):
            return 0.0
        if self.newest.over:
            return max(0.0, now - self.last_report())
        since = self.last_report() if self.newest.silent else max(self.last_report(), self.watched_since)
        return max(0.0, now - since - silent_seconds)

    # -- stored --------------------------------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether anything has happened since the last commit."""
        return bool(self.unsaved or self.events.unsaved or self.incidents.unsaved)

    def mark_stored(self) -> None:
        """Note that every change is committed."""
        for instance in self.unsaved.instances.values():
            instance.mark_stored()
        self.unsaved = Unsaved()
        self.events.mark_stored()
        self.incidents.mark_stored()

    def state(self) -> RunState:
        """Return what must survive in addition to the tables."""
        return RunState(
            experiment=self.experiment, attempts=[*self.attempts], totals=self.totals, errors=self.errors.counts
        )

    def bare_state(self) -> RunState:
        """Return the least that lets the run be loaded again, for when its whole state cannot be stored."""
        return RunState(experiment=self.experiment, attempts=[], totals=Totals(), errors=self.errors.counts)

    @classmethod
    def from_state(cls, name: str, state: RunState, hellos: Sequence[pb.Hello], rules: Rules = DEFAULT) -> Run:
        """Return the run as it was stored, yet without its instances, events, incidents, steps and records."""
        run = cls(state.experiment, name, rules, state.totals)
        # An attempt whose state could not be stored has only its hello.
        known = zip_longest(hellos, state.attempts)
        run.attempts += [Attempt(number, hello, attempt) for number, (hello, attempt) in enumerate(known)]
        run.errors.counts |= state.errors
        return run


def _new_records(members: Members, block: Block) -> list[tuple[list[Instance], Block]]:
    """Return what has not come before: of all members at once where they stand at the same step."""
    before = int(block.sequences[0]) - 1
    if all(instance.position == before and not instance.gaps for _, instance in members):
        return [([instance for _, instance in members], block.ranks([place for place, _ in members]))]
    each = [([i], block.records(place).above(i.position, i.gaps)) for place, i in members]
    return [(instances, Block.of_records(records)) for instances, records in each if len(records)]
