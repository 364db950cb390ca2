"""A collector's state without its network, and runs that end in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state.retention import Retention
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_collector.web.api import Api
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps

DAY = 86400.0


class Collector:
    """A collector's state, and runs that end."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock, self.session = path, clock, Session()
        self.store = Store(path)
        self.runs = self.store.load(clock(), archive_before=clock() - 1800.0)
        retention = Retention(self.store, seconds=28 * DAY, most_bytes=1e12, silent=900.0)
        self.intake = Intake(self.runs, self.store, clock, ended_seconds=900.0, silent=900.0, retention=retention)

    def run(
        self,
        name: str,
        *,
        launch: str = "first",
        count: int = 5,
        first: int = 1,
        experiment: str = "e",
        reason: str = "FINISHED",
        detail: str = "",
        norm: float = 1.0,
    ) -> Run:
        instance, session = f"{name}-{launch}", self.session
        self.intake.apply(hello(name, launch_id=launch, instance=instance, experiment=experiment), session)
        if count:
            self.intake.apply(steps(first, [norm] * count, instance=instance), session)
        left = pb.Exit(instance=instance, reason=reason, last_sequence=first + count - 1, detail=detail)
        self.intake.apply(pb.FromRecorder(exit=left), session)
        self.intake.commit()
        found = self.runs.find(instance)
        assert found is not None
        return found[0]

    def listed(self, **query: str) -> dict[str, Any]:
        """The API's list of runs."""
        lists = Api(runs=self.runs, store=self.store, clock=self.clock, silent=900.0)
        handlers = {route.path: route.handler for route in lists.routes() if isinstance(route, web.RouteDef)}
        answer: Any = handlers["/api/v1/runs"](cast(web.Request, SimpleNamespace(query=query)))
        with pytest.raises(StopIteration) as end:
            answer.send(None)
        found: dict[str, Any] = json.loads(end.value.value.text)
        return found

    def damage(self, run: str) -> None:
        self.store._db.execute("UPDATE runs SET state=x'c1' WHERE run=?", (run,))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.intake.commit()
        self.intake.expire()

    def in_memory(self) -> list[str]:
        return sorted(run.name for run in self.runs)


def with_ten_ended_runs(path: Path) -> Collector:
    """Runs r0 to r9, each of which ended 1000 s after the one before, the last one 1000 s ago."""
    made = Collector(path, Clock())
    for number in range(10):
        made.run(f"r{number}")
        made.wait(1000)
    return made
