"""What the recorder asks of one rank, without a process or a network."""

from __future__ import annotations

from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import Run
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.ranks import Rank
from foreshock_recorder.ring import Ring


def kinds(messages: list[pb.FromRecorder]) -> list[str | None]:
    return [message.WhichOneof("message") for message in messages]


class Listener:
    """Asks a rank for its messages; a collector that has stored `position`."""

    def __init__(self, ring: Ring) -> None:
        self.rank = Rank(ring.path)
        self.now = 1000.0

    def greet(self, position: int = 0) -> Listener:
        self.ask()
        self.store(position)
        return self

    def store(self, position: int, *, closed: bool = False) -> None:
        self.rank.acknowledge(pb.Ack.Position(instance=self.rank.instance, sequence=position, closed=closed))

    def ask(self, after: float = 0.0, *, interval: float = 1.0, limit: int = 512) -> list[pb.FromRecorder]:
        self.now += after
        self.rank.poll(self.now)
        return self.rank.next_messages(self.now, interval=interval, limit=limit)

    def batches(self, after: float = 0.0, *, interval: float = 1.0, limit: int = 512) -> list[pb.StepBatch]:
        return [m.steps for m in self.ask(after, interval=interval, limit=limit) if m.HasField("steps")]

    def sequences(self, after: float = 0.0, *, interval: float = 1.0, limit: int = 512) -> list[int]:
        batches = self.batches(after, interval=interval, limit=limit)
        return [b.first_sequence + i for b in batches for i in range(len(b.step))]


class StoringListener(Listener):
    """A recorder's view of one rank, and a collector's state that takes what it says."""

    def __init__(self, ring: Ring, runs: Runs) -> None:
        super().__init__(ring)
        self.runs = runs
        self.run: Run
        self.instance: Instance

    def run_stream(self, rounds: int = 40) -> StoringListener:
        """Until nothing more is said."""
        self.rank.restart_stream()
        for _ in range(rounds):
            for message in self.ask(after=1.0):
                self._take(message)
            self.run.finalize_steps(self.now)
            self.store(self.instance.position, closed=bool(self.instance.closed))
        return self

    def _take(self, message: pb.FromRecorder) -> None:
        if message.HasField("hello"):
            self.instance = self.runs.register(message.hello, self.now)
            self.run = next(iter(self.runs))
        elif message.HasField("steps"):
            self.run.ingest(self.instance, message.steps, self.now)
        elif message.HasField("exit"):
            self.run.close(self.instance, message.exit, self.now)

    def counts(self) -> tuple[int, int]:
        """Highest record stored; records counted as overwritten."""
        return self.instance.position, self.run.totals.dropped["ring_overrun"]
