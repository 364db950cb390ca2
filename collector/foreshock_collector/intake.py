"""What the collector does with a message: validate, keep, commit, acknowledge. Knows no gRPC."""

from __future__ import annotations

from collections.abc import Callable

from foreshock_collector.runs import Instance, Run, Runs
from foreshock_collector.steps import Step
from foreshock_collector.store import Store
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb

_NAME_LENGTH = 200
_MOST_RANKS = 1_000_000


class RefusedError(ValueError):
    """The message is wrong; the text says how."""


class UnknownVersionError(RefusedError):
    """The recorder speaks a version that this collector does not know."""


class Intake:
    """The one place where messages change state."""

    def __init__(self, runs: Runs, store: Store, clock: Callable[[], float]) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._batches: dict[str, list[tuple[Instance, pb.StepBatch]]] = {}
        self._touched: set[str] = set()
        self.urgent = False
        """Something came that should be committed and acknowledged at once."""

    def hello(self, hello: pb.Hello) -> str:
        """An instance introduces itself; its name."""
        if hello.schema_version != SCHEMA_VERSION:
            known = f"this collector knows version {SCHEMA_VERSION}: bring both to the same release"
            raise UnknownVersionError(f"schema_version {hello.schema_version} is unknown; {known}")
        for field in ("instance", "run", "experiment", "launch"):
            value = getattr(hello, field)
            if not value or len(value) > _NAME_LENGTH:
                raise RefusedError(f"hello.{field} must have 1 to {_NAME_LENGTH} characters, it has {len(value)}")
        world = hello.topology.world_size
        if not hello.topology.rank < world <= _MOST_RANKS:
            raise RefusedError(f"hello.topology: rank {hello.topology.rank} of world_size {world}")
        layers, parameters = len(hello.model.layers), len(hello.model.parameters)
        owners = hello.model.parameter_layers
        if len(owners) != parameters or any(owner >= layers for owner in owners):
            raise RefusedError("hello.model: parameter_layers does not fit parameters and layers")
        instance = self._runs.greet(hello, self._clock())
        self._touched.add(hello.run)
        self.urgent = True
        return instance.hello.instance

    def steps(self, batch: pb.StepBatch) -> None:
        """Records of one instance."""
        run = self._home(batch.instance)
        instance = run.instances[batch.instance]
        if batch.step and not batch.first_sequence:
            raise RefusedError("first_sequence must be 1 or more")
        try:
            run.take(batch, self._clock())
        except ValueError as error:
            raise RefusedError(str(error)) from error
        self._touched.add(run.name)
        if batch.step:
            self._batches.setdefault(run.name, []).append((instance, batch))

    def event(self, event: pb.Event) -> None:
        """Something happened to a rank."""
        run = self._home(event.instance)
        if event.kind == pb.Event.RANK_LOST:
            run.lose(run.instances[event.instance])
        self._touched.add(run.name)
        self.urgent = True

    def goodbye(self, goodbye: pb.Goodbye) -> None:
        """A rank has left."""
        run = self._home(goodbye.instance)
        run.close(run.instances[goodbye.instance], pb.Goodbye.Reason.Name(goodbye.reason))
        self._touched.add(run.name)
        self.urgent = True

    def settle(self) -> None:
        """Bring every run up to now, and commit what a run's detection has moved."""
        for run in self._runs:
            steps = run.settle(self._clock())
            if any(step.nonfinite for step in steps):
                self.urgent = True
            if steps:
                self._commit(run, steps)

    def commit(self) -> None:
        """Store all that has come since the last time."""
        self.settle()
        for name in list(self._touched):
            run = self._runs.get(name)
            assert run is not None
            self._commit(run, [])
        self.urgent = False

    def _commit(self, run: Run, steps: list[Step]) -> None:
        self._store.commit(run, steps, self._batches.pop(run.name, []))
        self._touched.discard(run.name)

    def position(self, instance: str) -> pb.Ack.Position:
        """How far an instance is stored. Call after `commit`."""
        state = self._home(instance).instances[instance]
        return pb.Ack.Position(instance=instance, sequence=state.position, closed=bool(state.closed))

    def _home(self, instance: str) -> Run:
        run = self._runs.home(instance)
        if run is None:
            raise RefusedError(f"instance {instance[:64]!r} has not said hello")
        return run
