"""What the collector does with a message: validate, keep, commit. Knows no gRPC."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

from foreshock_collector.ingest.session import RefusedError, Session
from foreshock_collector.ingest.statistics import IngestStatistics
from foreshock_collector.records.buffer import MAX_SEQUENCE, ColumnsError
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import ContradictionError, Run
from foreshock_collector.state.store import Store
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb

logger = logging.getLogger(__name__)

_NAME_LENGTH = 200
"""Names become labels of series, which should be short."""
_PATH_LENGTH = 2000
"""Parameters and layers of deeply wrapped models have long paths."""
_TEXT_LENGTH = 2000
_MOST_RANKS = 65_536


class Intake:
    """Applies messages to the state, and commits it. `clock` returns Unix time."""

    def __init__(
        self, runs: Runs, store: Store, clock: Callable[[], float], *, ended_seconds: float, silent: float
    ) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._ended_seconds = ended_seconds
        self._silent = silent
        self.statistics = IngestStatistics()
        self.urgent: set[str] = set()
        """Instances that must be acknowledged at once."""
        self.storing = True
        """Whether the last commit succeeded."""

    @property
    def errors(self) -> Errors:
        """Internal errors that no single run has caused."""
        return self._runs.errors

    def apply(self, message: pb.FromRecorder, session: Session) -> None:
        """Apply one message of a stream. Raises `RefusedError` for one that no recorder sends.

        A wrong hello affects its own instance alone.
        """
        which = message.WhichOneof("message")
        if which is None:
            raise RefusedError("the message is empty: it holds no hello, steps, event or exit", reason="malformed")
        if which == "hello":
            self._hello(message.hello, session)
            return
        content = getattr(message, which)
        if content.instance in session.refused:
            return
        if content.instance not in session.registered:
            name = content.instance[:_NAME_LENGTH]
            raise RefusedError(f"instance {name!r} has not said hello on this stream", reason="no_hello")
        found = self._runs.find(content.instance)
        assert found is not None
        run, instance = found
        try:
            if which == "steps":
                self._steps(run, instance, message.steps)
            elif which == "event":
                self._event(run, instance, message.event)
            else:
                self._exit(run, instance, message.exit)
        except RefusedError:
            raise
        except Exception as error:
            run.errors.add("ingest", error)
            if which == "steps":
                run.accept_unprocessed(instance, message.steps)
                self._commit([run])

    def _hello(self, hello: pb.Hello, session: Session) -> None:
        _check_version(hello)
        _check_name("hello.instance", hello.instance)
        self.urgent.add(hello.instance)
        try:
            hello = _validated(hello)
            self._runs.register(hello, self._clock())
        except RefusedError as error:
            self._refuse_instance(hello, session, str(error), error.reason)
        except ContradictionError as error:
            self._refuse_instance(hello, session, str(error), "contradiction")
        except Exception as error:
            self._runs.errors.add("ingest", error)
            self._refuse_instance(
                hello, session, "the collector failed on its hello; see the collector's log", "collector_error"
            )
        else:
            session.registered.add(hello.instance)
            session.refused.pop(hello.instance, None)

    def _refuse_instance(self, hello: pb.Hello, session: Session, why: str, reason: str) -> None:
        session.refused[hello.instance] = why
        session.registered.discard(hello.instance)
        self.statistics.refused[reason] += 1
        facts = {
            "instance": hello.instance,
            "run": _printable(hello.run, _NAME_LENGTH),
            "rank": hello.topology.rank,
            "node": _printable(hello.topology.node, _NAME_LENGTH),
            "peer": session.peer,
            "reason": reason,
            "why": why,
        }
        logger.warning("refused rank %(rank)d of run %(run)r on node %(node)r, %(peer)s: %(why)s", facts)

    def _steps(self, run: Run, instance: Instance, batch: pb.StepBatch) -> None:
        now = self._clock()
        if batch.step:  # without any, it only says that the rank is alive
            self.statistics.records += len(batch.step)
            self.statistics.waiting_since.setdefault(run.name, now)
        instance.nonfinite = False
        try:
            if run.ingest(instance, batch, now):
                self._commit([run])
        except ColumnsError as error:
            raise RefusedError(f"steps of instance {instance.name!r}: {error}") from error
        if instance.nonfinite:
            # The rank may be about to exit, and waits for this acknowledgement.
            self.urgent.add(instance.name)

    def _event(self, run: Run, instance: Instance, event: pb.Event) -> None:
        if event.kind not in pb.Event.Kind.values() or event.kind == pb.Event.KIND_UNSPECIFIED:
            return  # a newer recorder sent it: nothing to refuse
        event.detail = _printable(event.detail, _TEXT_LENGTH)
        run.record_event(instance, event, self._clock())
        self.urgent.add(instance.name)

    def _exit(self, run: Run, instance: Instance, exit_message: pb.Exit) -> None:
        exit_message.detail = _printable(exit_message.detail, _TEXT_LENGTH)
        if exit_message.last_sequence >= MAX_SEQUENCE:
            raise RefusedError(f"exit.last_sequence {exit_message.last_sequence} is out of range")
        if exit_message.reason not in pb.ExitReason.values():
            raise RefusedError(f"exit.reason {exit_message.reason} is unknown")
        run.close(instance, exit_message, self._clock())
        self.urgent.add(instance.name)

    def commit(self) -> None:
        """Finalize the steps that are due in every run, and store everything since the last commit.

        Nothing runs in between, so that nobody sees a counter that a crash could still set back.
        """
        now = self._clock()
        for run in self._runs:
            with run.errors.caught("evaluate"):
                if not run.evicted or run.changed:
                    run.finalize_steps(now)
        if self._commit(self._runs):
            self.urgent.clear()

    def commit_urgent(self) -> set[str]:
        """Commit the runs in which something cannot wait. Return the instances to acknowledge at once."""
        now = self._clock()
        if not self.storing:
            return set()  # the next commit of all tries again
        waiting, self.urgent = self.urgent, set()
        known = (self._runs.find(name) for name in waiting)
        urgent = {id(found[0]): found[0] for found in known if found is not None}
        for run in self._runs:
            with run.errors.caught("evaluate"):
                if id(run) in urgent or run.overdue(now):
                    urgent[id(run)] = run
                    run.finalize_steps(now)
        if self._commit(urgent.values()):
            return waiting
        self.urgent |= waiting
        return set()

    def _commit(self, runs: Iterable[Run]) -> bool:
        """Store the runs that have changed. Return False if that failed; then they stay changed, and nothing is lost.

        The first failure is logged, and the first success after it: not every attempt in between.
        """
        changed = [run for run in runs if run.changed]
        if changed and not self._store_changed(changed):
            return False
        waiting = self.statistics.waiting_since
        for name in [name for name in waiting if (run := self._runs.get(name)) is None or not run.changed]:
            del waiting[name]
        return True

    def _store_changed(self, runs: list[Run]) -> bool:
        began = time.perf_counter()
        try:
            self._store.commit(runs)
        except Exception as error:
            self._runs.errors.counts["commit"] += 1
            if self.storing:
                facts = {"error": str(error), "stage": "commit"}
                logger.exception("cannot commit: %(error)s; nothing is acknowledged until a commit succeeds", facts)
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

        An evicted run loses its series and records; its history stays in the database.
        """
        now = self._clock()
        for run in self._runs:
            with run.errors.caught("evaluate"):
                run.check_silence(now, self._silent)
                if not run.evicted and run.ended_for(now, self._silent) >= self._ended_seconds:
                    run.finalize_steps(now)
                    run.evict(now)
                    if self._commit([run]):
                        self._store.forget_window(run)
                        facts = {"run": run.name, "experiment": run.experiment}
                        logger.info("run %(run)s expired: its series are gone, its history stays", facts)

    def positions(self, session: Session) -> list[pb.Ack.Position]:
        """Return how far each instance of a stream is stored, or why it is refused."""
        found = []
        for name in sorted(session.registered):
            known = self._runs.find(name)
            assert known is not None
            run, instance = known
            found.append(
                pb.Ack.Position(instance=name, sequence=instance.stored, closed=instance.closed_stored, run=run.name)
            )
        return found + [pb.Ack.Position(instance=name, refused=why) for name, why in sorted(session.refused.items())]


def _check_version(hello: pb.Hello) -> None:
    if hello.schema_version != SCHEMA_VERSION:
        raise RefusedError(
            f"the recorder uses schema version {hello.schema_version}, the collector supports version "
            f"{SCHEMA_VERSION}: install the same release of foreshock on both",
            reason="schema_version",
        )


def _validated(hello: pb.Hello) -> pb.Hello:
    """Return the hello with printable names. Raises `RefusedError`."""
    # These identify a run, so they are never changed: accepted as they are, or refused.
    for name in ("run", "experiment", "launch_id"):
        _check_name(f"hello.{name}", getattr(hello, name))
    if not math.isfinite(hello.started_seconds):
        raise RefusedError("hello.started_seconds is not a time")
    place, model = hello.topology, hello.model
    if not place.rank < place.world_size <= _MOST_RANKS:
        raise RefusedError(f"hello.topology: rank {place.rank} of world_size {place.world_size}")
    parameters, layers = len(model.parameters), len(model.layers)
    for name in ("parameter_sizes", "parameter_layers"):
        if len(getattr(model, name)) != parameters:
            raise RefusedError(f"hello.model: {len(getattr(model, name))} {name} for {parameters} parameters")
    if any(layer >= layers for layer in model.parameter_layers):
        raise RefusedError(f"hello.model: parameter_layers points beyond the {layers} layers")
    shown = pb.Hello()
    shown.CopyFrom(hello)
    shown.clip = _printable(hello.clip, _NAME_LENGTH)
    shown.topology.node = _printable(place.node, _NAME_LENGTH)
    shown.optimizer.type = _printable(hello.optimizer.type, _NAME_LENGTH)
    shown.model.type = _printable(model.type, _NAME_LENGTH)
    shown.model.parameters[:] = [_printable(name, _PATH_LENGTH) for name in model.parameters]
    shown.model.layers[:] = [_printable(name, _PATH_LENGTH) for name in model.layers]
    shown.model.module_types.clear()
    for kind, count in model.module_types.items():
        shown.model.module_types[_printable(kind, _PATH_LENGTH)] = count
    return shown


def _check_name(where: str, name: str) -> None:
    if not 0 < len(name) <= _NAME_LENGTH:
        raise RefusedError(f"{where} must have 1 to {_NAME_LENGTH} characters, it has {len(name)}")
    if not name.isprintable():
        raise RefusedError(f"{where} holds characters that cannot be printed")


def _printable(text: str, limit: int) -> str:
    """Return text that fits a label and a terminal: shortened, with control characters escaped."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
