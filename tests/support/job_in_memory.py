"""A job of some ranks, as a stream brings its records to the collector's state: without a network."""

from __future__ import annotations

import math
import random
from typing import Any

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import hello, steps

NAN = math.nan
FAST = DEFAULT.with_overrides({"faults": {"vanishing_steps": 30, "divergence_steps": 40}})
RANK_COLUMNS = pb.LOSS_OBSERVED | pb.LOCAL_NORMS


class Job:
    """A run of some ranks, told to a collector's state without a network."""

    def __init__(self, ranks: int = 2, layers: int = 0, rules: Rules = FAST) -> None:
        self.runs = Runs(lambda _: rules)
        self.now = 1000.0
        self.layers = layers
        self.sent = [0] * ranks
        self.launches = 0
        for rank in range(ranks):
            self._greet(rank)

    def _greet(self, rank: int, **changes: Any) -> None:
        names = [f"layer{i}" for i in range(self.layers)]
        model = pb.ModelSummary(layers=names, parameters=names, parameter_sizes=[1] * self.layers)
        model.parameter_layers.extend(range(self.layers))
        told = hello(
            instance=self.name(rank),
            launch_id=f"l{self.launches}",
            topology=pb.Topology(world_size=len(self.sent), rank=rank),
            model=model,
            **({"started_seconds": self.now} | changes),
        )
        self.runs.register(told.hello, self.now)

    def name(self, rank: int) -> str:
        """Of the instance that the rank is now."""
        return f"r-{self.launches}-{rank}"

    @property
    def run(self) -> Run:
        found = self.runs.get("r")
        assert found is not None
        return found

    def tell(self, rank: int, norms: list[float], *, layer_norms: list[float] | None = None, **columns: Any) -> None:
        """Steps of one rank."""
        count = len(norms)
        told: dict[str, Any] = {"flags": [RANK_COLUMNS] * count, "loss": [2.0] * count, "local_norm": norms}
        batch = steps(self.sent[rank] + 1, norms, instance=self.name(rank), **(told | columns)).steps
        if layer_norms is not None:
            batch.global_layer_norms.extend(layer_norms)
        self.sent[rank] += count
        home = self.runs.find(self.name(rank))
        assert home is not None
        assert not self.run.ingest(home[1], batch, self.now), "so few steps need no room"

    def train(self, count: int, *, norm: float = 1.0, loss: list[float] | None = None, alike: bool = False) -> None:
        """Healthy steps on every rank; alike: all see the same data."""
        rng = random.Random(self.sent[0])
        norms = [norm * math.exp(rng.gauss(0, 0.05)) for _ in range(count)]
        for rank in range(len(self.sent)):
            local = norms if alike else [1.5 * n * math.exp(rng.gauss(0, 0.1)) for n in norms]
            self.tell(rank, norms, local_norm=local, loss=[2.0] * count if loss is None else loss)
        self.settle(1.0)

    def settle(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.run.finalize_steps(self.now)

    def event(self, rank: int, kind: pb.Event.Kind, seconds: float = 0.0, detail: str = "") -> None:
        home = self.runs.find(self.name(rank))
        assert home is not None
        told = pb.Event(instance=self.name(rank), kind=kind, wall_seconds=self.now + seconds, detail=detail)
        self.run.record_event(home[1], told, self.now)

    def leave(self, rank: int, reason: pb.ExitReason, detail: str = "") -> None:
        home = self.runs.find(self.name(rank))
        assert home is not None
        goodbye = pb.Exit(instance=self.name(rank), reason=reason, detail=detail, last_sequence=self.sent[rank])
        self.run.close(home[1], goodbye, self.now)

    def start_again(self, **changes: Any) -> None:
        """Another attempt, a second later."""
        self.now += 1.0
        self.launches += 1
        for rank in range(len(self.sent)):
            self.sent[rank] = 0
            self._greet(rank, **changes)

    def computed(self, rank: int, passes: int) -> None:
        """It is alive, and has computed so many backward passes."""
        batch = pb.StepBatch(instance=self.name(rank), first_sequence=self.sent[rank] + 1, backward_passes=passes)
        home = self.runs.find(self.name(rank))
        assert home is not None
        assert not self.run.ingest(home[1], batch, self.now)

    def heartbeat(self) -> None:
        for rank in range(len(self.sent)):
            home = self.runs.find(self.name(rank))
            assert home is not None
            self.run.heartbeat(home[1], self.now)

    def causes(self, *, only_open: bool = False) -> list[str]:
        kept = self.run.incidents.kept
        return [i.verdict.cause for i in kept if not only_open or i.closed_seconds is None]
