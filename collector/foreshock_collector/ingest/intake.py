"""What the collector does with a message: validate, keep, commit. Knows no gRPC."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from weakref import WeakValueDictionary

from foreshock_collector.ingest import answers
from foreshock_collector.ingest.run_limits import RunLimits
from foreshock_collector.ingest.session import RefusedError, Sender, Session
from foreshock_collector.ingest.statistics import IngestStatistics
from foreshock_collector.ingest.validation import check_instance, check_version, validated
from foreshock_collector.records.batch import MAX_SEQUENCE, ColumnsError
from foreshock_collector.state.database_file import GoneError
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.retention import Retention
from foreshock_collector.state.run_state import Members, received
from foreshock_collector.state.runs import LIVE_SECONDS, ContradictionError, Run
from foreshock_collector.state.schema import is_damage, is_of_file
from foreshock_collector.state.store import Store
from foreshock_collector.text import NAME_LENGTH, TEXT_LENGTH, printable
from foreshock_protos.v1 import telemetry_pb2 as pb

logger = logging.getLogger(__name__)

_NORM_HISTORY = "norm_history"
"""Capability of an instance that asks for the history of the attempt before."""
_PART_SECONDS = 0.03
"""Of a commit of all runs: nothing else happens meanwhile, and a part is longer by its own storing."""
_NOTICE = "notice"
"""Capability of an instance that mirrors its run in other tools."""


class Intake:
    """Applies messages to the state, and commits it.

    clock: returns Unix time. jumped: returns by how many seconds it was set since it was last asked.
    """

    def __init__(
        self,
        runs: Runs,
        store: Store,
        clock: Callable[[], float],
        *,
        ended_seconds: float,
        silent: float,
        jumped: Callable[[], float] = lambda: 0.0,
        retention: Retention | None = None,
        most_runs: int = 1000,
    ) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._jumped = jumped
        self._retention = retention
        self._ended_seconds = ended_seconds
        self._silent = silent
        self.statistics = IngestStatistics()
        self._limits = RunLimits(most_runs)
        self._streams: WeakValueDictionary[str, Session] = WeakValueDictionary()
        """The newest stream of each instance without a token."""
        self.urgent: set[str] = set()
        """Instances that must be acknowledged at once."""
        self.storing = True
        """Whether the last commit succeeded."""
        self.database_error: Exception | None = None
        """Why no commit can succeed any more: the database is damaged, or gone."""

    @property
    def errors(self) -> Errors:
        """Internal errors that no single run has caused."""
        return self._runs.errors

    def _now(self) -> float:
        """Return Unix time. If the clock was set, first move all that is known of the past: ages stay what they are."""
        if seconds := self._jumped():
            text = "the clock of this machine was set by %(seconds)+.0f s; what was measured by it is moved as well"
            logger.warning(text, {"seconds": seconds})
            self._runs.move_clock(seconds)
            self.statistics.move_clock(seconds)
        return self._clock()

    def apply(self, message: pb.FromRecorder, session: Session) -> None:
        """Apply one message of a stream. Raises `RefusedError` for one that no recorder sends.

        What is wrong with one instance affects that one alone. A kind of message that is not known is skipped.
        """
        which = message.WhichOneof("message")
        if which is None:
            self.statistics.skipped += 1
            return
        if which == "hello":
            self._hello(message.hello, session)
            return
        if which == "block":
            self._block(message.block, session)
            return
        found = self._home(getattr(message, which).instance, session)
        if found is None:
            return
        run, instance = found
        try:
            if which == "steps":
                self._steps(run, [(0, instance)], message.steps)
            elif which == "event":
                self._event(run, instance, message.event)
            else:
                self._exit(run, instance, message.exit)
        except RefusedError as error:
            self._refuse_known(run, instance, session, error)
        except Exception as error:
            run.errors.add("ingest", error)
            if which == "steps":
                self._accept_unprocessed(run, [instance], message.steps)

    def _home(self, name: str, session: Session) -> tuple[Run, Instance] | None:
        """Return an instance that a message names, and its run; None if the instance is refused on this stream."""
        if name in session.refused:
            return None
        if name not in session.registered:
            raise RefusedError(f"instance {name[:NAME_LENGTH]!r} has not said hello on this stream", reason="no_hello")
        found = self._runs.find(name)
        if found is None:
            # With another stream, and another hello, the instance begins a new run.
            raise LookupError(f"the run of instance {name!r} cannot be decoded, and was set aside")
        return found

    def _block(self, block: pb.StepBlock, session: Session) -> None:
        """Take records of several ranks. The ranks of one launch may have become attempts of different runs."""
        if len({rank.instance for rank in block.ranks}) < len(block.ranks):
            raise RefusedError("a block has two ranks with the same instance")
        launches: dict[tuple[str, int], tuple[Run, list[tuple[int, Instance]]]] = {}
        for place, rank in enumerate(block.ranks):
            if (found := self._home(rank.instance, session)) is not None:
                run, instance = found
                launches.setdefault((run.name, instance.attempt), (run, []))[1].append((place, instance))
        for run, members in launches.values():
            try:
                self._steps(run, members, block)
            except RefusedError as error:
                for _, instance in members:
                    self._refuse_known(run, instance, session, error)
            except Exception as error:
                run.errors.add("ingest", error)
                self._accept_unprocessed(run, [instance for _, instance in members], block)

    def _hello(self, hello: pb.Hello, session: Session) -> None:
        check_version(hello)
        check_instance(hello.instance)
        sender = Sender(
            instance=hello.instance,
            run=printable(hello.run, NAME_LENGTH),
            rank=hello.topology.rank,
            node=printable(hello.topology.node, NAME_LENGTH),
        )
        try:
            hello = validated(hello)
            if session.token is not None and not session.token.allows(hello.experiment):
                text = f"the recorder's token is for experiments {session.token.experiment!r}, not {hello.experiment!r}"
                raise RefusedError(text, reason="token")
            self._check_stream(hello, session)
            now = self._now()
            begins_rank = self._runs.find_in_memory(hello.instance) is None
            self._limits.admit(session.host, launch=self._runs.begins_run(hello), rank=begins_rank)
            self._runs.register(hello, now, host=session.host)
        except RefusedError as error:
            self._refuse_instance(sender, session, str(error), error.reason)
        except ContradictionError as error:
            self._refuse_instance(sender, session, str(error), "contradiction")
        except Exception as error:
            self._runs.errors.add("ingest", error)
            if is_damage(error):
                self.database_error = error
            self._refuse_instance(
                sender, session, "the collector failed on its hello; see the collector's log", "collector_error"
            )
        else:
            session.registered.add(hello.instance)
            session.refused.pop(hello.instance, None)
            if _NOTICE in hello.capabilities:
                session.mirroring.add(hello.instance)
            if _NORM_HISTORY in hello.capabilities:
                # The rank waits for the answer.
                session.resuming.add(hello.instance)
                self.urgent.add(hello.instance)
            if not hello.token:
                self._streams[hello.instance] = session

    def _check_stream(self, hello: pb.Hello, session: Session) -> None:
        """Refuse an instance without a token that another stream sends. Raises `ContradictionError`.

        A stream that has sent nothing for a while may be one whose end is not known yet.
        """
        other, known = self._streams.get(hello.instance), self._runs.find(hello.instance)
        if other is None or other is session or not other.open or known is None:
            return
        if self._now() - known[1].last_report < LIVE_SECONDS:
            raise ContradictionError("another stream sends this instance")

    def _refuse_instance(self, sender: Sender, session: Session, why: str, reason: str) -> None:
        session.refused[sender.instance] = why
        session.registered.discard(sender.instance)
        self.urgent.add(sender.instance)
        self.statistics.refused[reason] += 1
        facts = {
            "instance": sender.instance,
            "run": sender.run,
            "rank": sender.rank,
            "node": sender.node,
            "peer": session.peer,
            "reason": reason,
            "why": why,
        }
        logger.warning("refused rank %(rank)d of run %(run)r on node %(node)r, %(peer)s: %(why)s", facts)

    def _refuse_known(self, run: Run, instance: Instance, session: Session, error: RefusedError) -> None:
        sender = Sender(instance=instance.name, run=run.name, rank=instance.rank, node=instance.node)
        self._refuse_instance(sender, session, str(error), error.reason)

    def _steps(self, run: Run, members: Members, steps: pb.StepBatch | pb.StepBlock) -> None:
        """Take records. members: the batch's instance, or those of the block's that are of this run."""
        self._load_evidence(run)
        now = self._now()
        count = len(steps.step) if isinstance(steps, pb.StepBatch) else steps.steps
        if count:  # without any, it only says that the ranks are alive
            self.statistics.records += count * len(members)
            self.statistics.waiting_since.setdefault(run.name, now)
        for _, instance in members:
            instance.nonfinite = False
        try:
            if isinstance(steps, pb.StepBatch):
                finalized = run.ingest(members[0][1], steps, now)
            else:
                finalized = run.ingest_block(members, steps, now)
        except ColumnsError as error:
            raise RefusedError(f"steps of instance {members[0][1].name!r}: {error}") from error
        if finalized:
            self._commit([run])
        # These ranks may be about to exit, and wait for this acknowledgement.
        self.urgent.update(instance.name for _, instance in members if instance.nonfinite)

    def _load_evidence(self, run: Run) -> None:
        """Load what a start has left in the store, so that the collector listens before it has read all of it."""
        while run.evidence:
            try:
                run.evidence.pop()()
            except Exception as error:
                run.errors.add("ingest", error)
                if is_damage(error):
                    self.database_error = error

    def _finalize(self, run: Run, now: float) -> None:
        self._load_evidence(run)
        with run.errors.caught("evaluate"):
            run.finalize_steps(now)

    def _accept_unprocessed(self, run: Run, instances: list[Instance], steps: pb.StepBatch | pb.StepBlock) -> None:
        run.accept_unprocessed(instances, received(instances[0], steps), self._now())
        self._commit([run])

    def _event(self, run: Run, instance: Instance, event: pb.Event) -> None:
        if event.kind not in pb.Event.Kind.values() or event.kind == pb.Event.KIND_UNSPECIFIED:
            return  # a newer recorder sent it: nothing to refuse
        event.detail = printable(event.detail, TEXT_LENGTH)
        run.record_event(instance, event, self._now())
        self.urgent.add(instance.name)

    def _exit(self, run: Run, instance: Instance, exit_message: pb.Exit) -> None:
        exit_message.detail = printable(exit_message.detail, TEXT_LENGTH)
        if exit_message.last_sequence >= MAX_SEQUENCE:
            raise RefusedError(f"exit.last_sequence {exit_message.last_sequence} is out of range")
        if exit_message.reason not in pb.ExitReason.values():
            raise RefusedError(f"exit.reason {exit_message.reason} is unknown")
        run.close(instance, exit_message, self._now())
        self.urgent.add(instance.name)

    def commit(self) -> None:
        """Finalize the steps that are due in every run, and store everything since the last commit."""
        for _ in self.commit_in_parts():
            pass

    def commit_in_parts(self) -> Iterator[None]:
        """Do the same, and yield after some of the runs: others may have their turn.

        Between finalizing a run's steps and storing them, nothing runs: nobody sees a counter that a crash could still
        set back.
        """
        now = self._now()
        self._limits.count(run for run in self._runs if run.ended_for(now, self._silent) < self._ended_seconds)
        waiting, self.urgent = self.urgent, set()
        stored, part, began = True, list[Run](), time.perf_counter()
        for run in list(self._runs):
            part.append(run)
            if not run.evicted or run.changed:
                self._finalize(run, now)
            if time.perf_counter() - began >= _PART_SECONDS:
                stored &= self._commit(part)
                yield
                part, now, began = [], self._now(), time.perf_counter()
        if not (self._commit(part) and stored):
            self.urgent |= waiting

    def commit_session(self, session: Session) -> None:
        """Finalize and store the runs of one stream, which is about to end."""
        now = self._now()
        known = (self._runs.find_in_memory(name) for name in session.registered)
        runs = {id(found[0]): found[0] for found in known if found is not None}
        for run in runs.values():
            self._finalize(run, now)
        self._commit(runs.values())

    def commit_urgent(self) -> set[str]:
        """Commit the runs in which something cannot wait. Return the instances to acknowledge at once."""
        now = self._now()
        if not self.storing:
            return set()  # the next commit of all tries again
        waiting, self.urgent = self.urgent, set()
        known = (self._runs.find_in_memory(name) for name in waiting)
        urgent = {id(found[0]): found[0] for found in known if found is not None}
        for run in self._runs:
            if id(run) in urgent or run.errors.value("evaluate", False, run.overdue, now):
                urgent[id(run)] = run
                self._finalize(run, now)
        if self._commit(urgent.values()):
            self.statistics.urgent_commits += bool(urgent)
            return waiting
        self.urgent |= waiting
        return set()

    def _commit(self, runs: Collection[Run]) -> bool:
        """Store the runs that have changed. Return False if that failed; then they stay changed, and nothing is lost.

        The first failure is logged, and the first success after it: not every attempt in between.
        """
        changed = [run for run in runs if run.changed]
        if changed and not self._store_changed(changed):
            return False
        for run in runs:
            if not run.changed:
                self.statistics.waiting_since.pop(run.name, None)
        return True

    def _store_changed(self, runs: list[Run]) -> bool:
        began = time.perf_counter()
        try:
            self._store.commit(runs)
        except Exception as error:
            self._runs.errors.counts["commit"] += 1
            if isinstance(error, GoneError) or is_damage(error):
                self.database_error = error
            if self.storing:
                facts = {"error": str(error), "stage": "commit"}
                text = "cannot commit: %(error)s; nothing is acknowledged until a commit succeeds"
                logger.error(text, facts, exc_info=not is_of_file(error))
            self.storing = False
            return False
        finally:
            self.statistics.commit_seconds.add(time.perf_counter() - began)
        if not self.storing:
            logger.warning("commits succeed again")
        self.storing = True
        return True

    def expire(self) -> None:
        """Detect runs that have fallen silent, and evict those that ended long enough ago.

        An evicted run loses its series and records; its history stays in the database. Of many evicted runs, only the
        newest stay in memory.
        """
        now, over = self._now(), list[Run]()
        for run in self._runs:
            with run.errors.caught("evaluate"):
                run.check_silence(now, self._silent)
                if not run.evicted and run.ended_for(now, self._silent) >= self._ended_seconds:
                    self._finalize(run, now)
                    run.evict(now)
                    if self._commit([run]):
                        self._store.forget_window(run)
                        facts = {"run": run.name, "experiment": run.experiment}
                        logger.info("run %(run)s expired: its series are gone, its history stays", facts)
                if run.over and run.ended_for(now, self._silent) >= self._ended_seconds:
                    over.append(run)
        self._runs.archive(over)
        if self._retention is not None:
            self._retention.delete_some(self._runs, now)

    def held_seconds(self, session: Session) -> float:
        """Return for how long the steps of a stream's jobs stay in memory; see `answers`."""
        return answers.held_seconds(self._runs, session)

    def positions(self, session: Session) -> list[pb.Ack.Position]:
        """Return what an acknowledgement says about each instance of a stream; see `answers`."""
        return answers.positions(self._runs, session)
