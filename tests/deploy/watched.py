"""A job told to a collector's intake under a clock of the test's own, its series as Prometheus would have scraped them,
and what the shipped rules make of these."""

from __future__ import annotations

import json
import math
import random
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_collector.web.collector_series import CollectorSeries
from foreshock_collector.web.exposition import RunSeries
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.deploy.firing import SCRAPE_SECONDS, fired_in, quiet
from tests.support.streams import hello, steps

TICK_SECONDS = 5.0
FIRST_SCRAPE = 121
"""Promtool's clock starts at 0, and an event at 0 means never."""
SILENT_SECONDS = 900.0
SOON = DEFAULT.with_overrides({"faults": {"vanishing_steps": 30, "divergence_steps": 40}})
MEASURED = pb.LOSS_OBSERVED | pb.LOCAL_NORMS


class Watched:
    """Run "r" of experiment "e"."""

    def __init__(self, *, ranks: int = 2, layers: int = 0) -> None:
        self.now = (FIRST_SCRAPE - 1.0) * SCRAPE_SECONDS
        self.runs = Runs(lambda _: SOON)
        limits: dict[str, Any] = {"ended_seconds": SILENT_SECONDS, "silent": SILENT_SECONDS}
        store, clock = Store(":memory:"), lambda: self.now
        weakref.finalize(self, store.close)
        self._intake = Intake(self.runs, store, clock, **limits)
        self._registry = CollectorRegistry()
        self._registry.register(RunSeries(self.runs, clock, **limits))
        itself = CollectorSeries(
            self._intake.statistics,
            self.runs.errors,
            store.size_bytes,
            clock,
            version="0",
            notifications=NotificationStatistics(),
        )
        self._registry.register(itself)
        self._session = Session()
        self._scrapes: list[dict[str, float]] = []
        self._ranks, self._layers, self._launches = ranks, layers, 0
        self.start()

    @property
    def run(self) -> Run:
        found = self.runs.get("r")
        assert found is not None
        return found

    def start(self) -> None:
        """The next attempt."""
        self._launches += 1
        self._sent = [0] * self._ranks
        self._there = set(range(self._ranks))
        names = [f"layer{i}" for i in range(self._layers)]
        model = pb.ModelSummary(layers=names, parameters=names, parameter_sizes=[1] * self._layers)
        model.parameter_layers.extend(range(self._layers))
        for rank in range(self._ranks):
            place = pb.Topology(world_size=self._ranks, rank=rank)
            instance, launch = self._name(rank), f"l{self._launches}"
            self._take(
                hello(instance=instance, launch_id=launch, started_seconds=self.now, topology=place, model=model)
            )

    def tell(self, rank: int, norms: list[float], *, layer_norms: list[float] | None = None, **columns: Any) -> None:
        """Steps of one rank, a tenth of a second each."""
        count, first = len(norms), self._sent[rank] + 1
        told: dict[str, Any] = {"flags": [MEASURED] * count, "loss": [2.0] * count, "loss_scale": [1.0] * count}
        message = steps(first, norms, instance=self._name(rank), **(told | {"local_norm": norms} | columns))
        message.steps.global_layer_norms.extend(layer_norms or ())
        self._sent[rank] += count
        self._take(message)

    def train(self, count: int, *, loss: list[float] | None = None, alike: bool = False) -> None:
        """Healthy steps on every rank; alike: all see the same data."""
        rng = random.Random(self._sent[0])
        norms = [math.exp(rng.gauss(0, 0.05)) for _ in range(count)]
        for rank in range(self._ranks):
            local = norms if alike else [1.5 * norm * math.exp(rng.gauss(0, 0.1)) for norm in norms]
            self.tell(rank, norms, local_norm=local, loss=[2.0] * count if loss is None else loss)

    def compute(self, rank: int, passes: int) -> None:
        """It is alive, and has computed so many backward passes."""
        self._take(pb.FromRecorder(steps=pb.StepBatch(instance=self._name(rank), backward_passes=passes)))

    def vanish(self, rank: int) -> None:
        """Its recorder sees that its process is gone."""
        told = pb.Event(instance=self._name(rank), kind=pb.Event.RANK_LOST, wall_seconds=self.now)
        self._take(pb.FromRecorder(event=told))
        self.leave(rank, pb.ExitReason.LOST)

    def leave(self, rank: int, reason: pb.ExitReason, detail: str = "") -> None:
        self._there.discard(rank)
        goodbye = pb.Exit(instance=self._name(rank), reason=reason, detail=detail, last_sequence=self._sent[rank])
        self._take(pb.FromRecorder(exit=goodbye))

    def silence(self) -> None:
        """Nothing more is heard of it."""
        self._there.clear()

    def wait(self, seconds: float) -> None:
        """Ranks that are there say so; Prometheus scrapes."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            for rank in self._there:
                self._take(pb.FromRecorder(steps=pb.StepBatch(instance=self._name(rank))))
            self._intake.commit()
            self._intake.expire()
            if self.now % SCRAPE_SECONDS == 0:
                self._scrapes.append(self._scraped())

    def go_on(self, seconds: float) -> None:
        """Healthy steps meanwhile."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.train(2)
            self.wait(TICK_SECONDS)

    def at_its_end(self, name: str) -> dict[str, Any]:
        """A test of promtool by which nothing fires at the last scrape."""
        series: dict[str, list[str]] = {}
        for number, scraped in enumerate(self._scrapes, FIRST_SCRAPE):
            for one in series.keys() | scraped.keys():
                values = series.setdefault(one, ["_"] * number)
                gone = "_" if values[-1] in ("_", "stale") else "stale"
                values.append(repr(scraped[one]) if one in scraped else gone)
        return quiet(series, name, [f"{round(self.now)}s"])

    def _scraped(self) -> dict[str, float]:
        text = generate_latest(self._registry).decode()
        return {
            f"{sample.name}{{{','.join(f'{k}={json.dumps(v)}' for k, v in sample.labels.items())}}}": sample.value
            for family in text_string_to_metric_families(text)
            if family.type != "histogram"
            for sample in family.samples
        }

    def _name(self, rank: int) -> str:
        return f"r-{self._launches}-{rank}"

    def _take(self, message: pb.FromRecorder) -> None:
        self._intake.apply(message, self._session)
        assert not self._session.refused


def alerts_of(scenarios: Mapping[str, Watched], folder: Path) -> dict[str, dict[str, str]]:
    """Of each scenario, what fires at its last scrape: alert and description."""
    found: dict[str, dict[str, str]] = {name: {} for name in scenarios}
    tests = [watched.at_its_end(name) for name, watched in scenarios.items()]
    for fired in fired_in(tests, folder):
        found[fired.test][fired.alert] = fired.annotations["description"]
    return found
