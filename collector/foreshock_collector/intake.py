"""What the collector does with a message: validate, keep, commit. Knows no gRPC."""

from __future__ import annotations

import math
from collections.abc import Callable

from foreshock_collector.attempts import Instance
from foreshock_collector.runs import ContradictionError, Run, Runs
from foreshock_collector.store import Store
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb

_NAME_LENGTH = 200
"""Names become labels of series: longer ones are nobody's intention."""
_PATH_LENGTH = 2000
"""Parameters and layers of deeply wrapped models have long paths."""
_TEXT_LENGTH = 2000
_MOST_RANKS = 65_536


class RefusedError(ValueError):
    """The message is wrong; the text says how."""


class UnknownVersionError(RefusedError):
    """The recorder speaks a version that this collector does not know."""


class Intake:
    """The one place where messages change state. `clock` gives Unix time."""

    def __init__(
        self, runs: Runs, store: Store, clock: Callable[[], float], *, ended_seconds: float, silent: float
    ) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._ended_seconds = ended_seconds
        self._silent = silent
        self.urgent: set[str] = set()
        """Instances that wait for an acknowledgement at once."""

    def take(self, message: pb.FromRecorder, greeted: set[str]) -> None:
        """One message of a stream. greeted: instances that have said hello on it. Raises `RefusedError`."""
        which = message.WhichOneof("message")
        if which is None:
            raise RefusedError("the message is empty: it holds no hello, steps, event or goodbye")
        if which == "hello":
            self._hello(message.hello)
            greeted.add(message.hello.instance)
            return
        content = getattr(message, which)
        if content.instance not in greeted:
            raise RefusedError(f"instance {content.instance[:_NAME_LENGTH]!r} has not said hello on this stream")
        home = self._runs.home(content.instance)
        assert home is not None
        run, instance = home
        if which == "steps":
            self._steps(run, instance, message.steps)
        elif which == "event":
            self._event(run, instance, message.event)
        else:
            self._goodbye(run, instance, message.goodbye)

    def _hello(self, hello: pb.Hello) -> None:
        _check_hello(hello)
        try:
            instance = self._runs.greet(hello, self._clock())
        except ContradictionError as error:
            raise RefusedError(f"hello of instance {hello.instance!r}: {error}") from error
        self.urgent.add(instance.name)

    def _steps(self, run: Run, instance: Instance, batch: pb.StepBatch) -> None:
        now = self._clock()
        instance.troubled = False
        try:
            for room in run.take(instance, batch, now):
                run.settle(now, attempt=instance.attempt, at_least=room)
                self._store.commit([run])
        except ValueError as error:
            raise RefusedError(f"steps of instance {instance.name!r}: {error}") from error
        if instance.troubled:
            # It may be this rank's last word: let it know soon that it is safe.
            self.urgent.add(instance.name)

    def _event(self, run: Run, instance: Instance, event: pb.Event) -> None:
        if event.kind not in pb.Event.Kind.values() or event.kind == pb.Event.KIND_UNSPECIFIED:
            return  # of a later version: nothing to refuse
        _check_text("event.detail", event.detail)
        run.happened(instance, event, self._clock())
        self.urgent.add(instance.name)

    def _goodbye(self, run: Run, instance: Instance, goodbye: pb.Goodbye) -> None:
        _check_text("goodbye.detail", goodbye.detail)
        if goodbye.reason not in pb.Goodbye.Reason.values():
            raise RefusedError(f"goodbye.reason {goodbye.reason} is unknown")
        run.leave(instance, goodbye, self._clock())
        self.urgent.add(instance.name)

    def commit(self) -> None:
        """Settle what is due in every run, and store all that has come since the last time.

        Both in one go: nobody sees a counter that a crash could still set back.
        """
        now = self._clock()
        for run in self._runs:
            if not run.resting or run.changes is not None:
                run.settle(now)
        self._store.commit(self._runs)
        self.urgent.clear()

    def commit_urgent(self) -> set[str]:
        """The same for runs in which something cannot wait; the instances to acknowledge at once."""
        now = self._clock()
        waiting, self.urgent = self.urgent, set()
        homes = (self._runs.home(name) for name in waiting)
        hasty = {id(home[0]): home[0] for home in homes if home is not None}
        hasty |= {id(run): run for run in self._runs if run.overdue(now)}
        for run in hasty.values():
            run.settle(now)
        self._store.commit(hasty.values())
        return waiting

    def expire(self) -> None:
        """Let go of runs that have ended long enough ago: their series and records; the history stays."""
        now = self._clock()
        for run in self._runs:
            if not run.resting and run.ended_for(now, self._silent) >= self._ended_seconds:
                run.settle(now)
                run.rest(now)
                self._store.commit([run])
                self._store.forget_window(run)

    def position(self, name: str) -> pb.Ack.Position:
        """How far an instance is stored."""
        home = self._runs.home(name)
        assert home is not None
        return pb.Ack.Position(instance=name, sequence=home[1].stored, closed=home[1].closed_stored)


def _check_hello(hello: pb.Hello) -> None:
    if hello.schema_version != SCHEMA_VERSION:
        raise UnknownVersionError(
            f"this recorder speaks schema version {hello.schema_version}, this collector knows version "
            f"{SCHEMA_VERSION}: bring both to the same release of foreshock"
        )
    for name in ("instance", "run", "experiment", "launch"):
        _check_name(f"hello.{name}", getattr(hello, name), least=1)
    _check_name("hello.clip", hello.clip)
    _check_name("hello.topology.node", hello.topology.node)
    _check_name("hello.model.type", hello.model.type)
    _check_name("hello.optimizer.type", hello.optimizer.type)
    if not math.isfinite(hello.started_seconds):
        raise RefusedError("hello.started_seconds is not a time")
    place, model = hello.topology, hello.model
    if not place.rank < place.world_size <= _MOST_RANKS:
        raise RefusedError(f"hello.topology: rank {place.rank} of world_size {place.world_size}")
    for name in (*model.parameters, *model.layers, *model.module_types):
        _check_name("a name in hello.model", name, most=_PATH_LENGTH)
    parameters, layers = len(model.parameters), len(model.layers)
    for name in ("parameter_sizes", "parameter_layers"):
        if len(getattr(model, name)) != parameters:
            raise RefusedError(f"hello.model: {len(getattr(model, name))} {name} for {parameters} parameters")
    if any(layer >= layers for layer in model.parameter_layers):
        raise RefusedError(f"hello.model: parameter_layers points beyond the {layers} layers")


def _check_name(where: str, name: str, *, least: int = 0, most: int = _NAME_LENGTH) -> None:
    if not least <= len(name) <= most:
        raise RefusedError(f"{where} must have {least} to {most} characters, it has {len(name)}")
    if not name.isprintable():
        raise RefusedError(f"{where} holds characters that cannot be printed")


def _check_text(where: str, text: str) -> None:
    if len(text) > _TEXT_LENGTH:
        raise RefusedError(f"{where} may have {_TEXT_LENGTH} characters, it has {len(text)}")
