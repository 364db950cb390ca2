"""A collector without a network, and what must hold of it whatever it is told."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from foreshock_collector.analysis.rules import Rules
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import RefusedError, Session
from foreshock_collector.state.errors import Errors
from foreshock_collector.state.store import Store
from foreshock_collector.web.api import Api
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.rendering import Renderer
from foreshock_protos.v1 import telemetry_pb2 as pb

_LIMITS: dict[str, Any] = {"ended_seconds": 900.0, "silent": 900.0}
_SAMPLE = re.compile(r" (\S+)$", re.MULTILINE)


class Live:
    """Runs, store and intake of one collector; time stands still but for `now`. No error is swallowed in it."""

    def __init__(self, rules: Rules) -> None:
        self.now = 1000.0
        self._rules = rules
        self._store = Store(":memory:")
        self.restart()

    def close(self) -> None:
        self._store.close()

    def restart(self) -> None:
        """As after a kill: what has not been committed is gone, and recorders say hello again."""
        self.runs = self._store.load(self.now, lambda _: self._rules)
        self.intake = Intake(self.runs, self._store, lambda: self.now, **_LIMITS)
        self.session = Session()

    def take(self, message: pb.FromRecorder) -> bool:
        """One message, in the bytes that it has on the wire; False: refused, and the stream is over."""
        try:
            self.intake.apply(pb.FromRecorder.FromString(message.SerializeToString()), self.session)
        except RefusedError:
            self.session = Session()
            return False
        return True

    def commit(self, seconds: float = 3.0) -> None:
        """Everything that is due is put together, judged and stored."""
        self.now += seconds
        self.intake.commit_urgent()
        self.intake.commit()
        self.intake.positions(self.session)

    def check(self) -> None:
        """What it tells is made of finite numbers, on every way, and no error has been swallowed."""
        assert self.intake.storing
        assert not self.runs.errors.nonzero(), self.runs.errors.nonzero()
        registry = CollectorRegistry()
        series = RunSeries(self.runs, lambda: self.now, **_LIMITS)
        registry.register(series)
        text = generate_latest(registry).decode()
        rendered = Renderer((series,), CollectorRegistry()).render().decode()
        assert numbers_alike(rendered) == numbers_alike(text)
        for number in _SAMPLE.findall("\n".join(line for line in text.splitlines() if line[0] != "#")):
            assert number[-1].isdigit(), number
        api = Api(runs=self.runs, store=self._store, clock=lambda: self.now, silent=_LIMITS["silent"])
        listed, *of_a_run, heat, incident = (route.handler for route in api.routes() if isinstance(route, web.RouteDef))
        assert len(_asked(listed, {"recent": "1"})["runs"]) == len(list(self.runs))
        for run in self.runs:
            assert not run.errors.nonzero(), run.errors.nonzero()
            for handler in of_a_run:
                _asked(handler, {"points": "20"}, run=run.name)
            for by in ("ranks", "layers"):
                _asked(heat, {"columns": "9"}, run=run.name, by=by)
            for kept in list(run.incidents.kept)[-3:]:
                _asked(incident, {}, run=run.name, id=str(kept.number))


@contextmanager
def unmuffled() -> Iterator[None]:
    """Errors that the collector would take into quarantine come out, and so do warnings."""

    def fail(_: Errors, stage: str, error: Exception, about: str = "") -> None:
        raise AssertionError(f"{stage} {about}: {error!r}") from error

    with mock.patch.object(Errors, "add", fail), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _asked(handler: Any, query: dict[str, str], **match: str) -> Any:
    # All that a handler reads of a request; a whole one takes longer to make than the answer.
    request = SimpleNamespace(query=query, match_info=match)
    text = _done(handler(request)).text
    assert text is not None
    return json.loads(text, parse_constant=_refuse)


def _done(answer: Coroutine[Any, Any, web.Response]) -> web.Response:
    """Handlers wait for nothing but their turn."""
    while True:
        try:
            answer.send(None)
        except StopIteration as end:
            response: web.Response = end.value
            return response


def _refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def numbers_alike(text: str) -> list[str]:
    """Lines, with each number as Python writes it."""
    found = []
    for line in text.split("\n"):
        head, _, number = line.rpartition(" ")
        found.append(line if line.startswith("#") or not line else f"{head} {float(number)!r}")
    return found
