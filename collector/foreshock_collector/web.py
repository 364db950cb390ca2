"""The HTTP side: metrics, health, the API as JSON, runbooks. Read-only."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from foreshock_collector.attempts import Attempt, Instance
from foreshock_collector.runs import Run, Runs
from foreshock_collector.shipped import shipped
from foreshock_collector.store import Store

_MOST_STEPS = 10_000
_MOST_RANK_COLUMNS = 64
"""Local norms by rank and step are told of at most so many ranks."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_INDEX = """Foreshock collector

/metrics                      for Prometheus
/api/v1/runs                  runs, as JSON
/api/v1/runs/{run}            one of them: ranks, events, incidents
/api/v1/runs/{run}/steps      its steps, a column each: ?attempt=&after=&limit=
/api/v1/runs/{run}/incidents/{id}
/runbooks                     what to do about an alert
/-/healthy  /-/ready
"""


class Pages:
    """The handlers, and what they read."""

    def __init__(
        self,
        *,
        runs: Runs,
        store: Store,
        registry: CollectorRegistry,
        clock: Callable[[], float],
        silent: float,
        cache_seconds: float,
    ) -> None:
        self._runs = runs
        self._store = store
        self._registry = registry
        self._clock = clock
        self._silent = silent
        self._cache_seconds = cache_seconds
        self._rendered: tuple[float, bytes, bytes] = (-math.inf, b"", b"")
        self.ready = False
        """Records are taken in."""

    def drain(self) -> None:
        """No more records are taken in: load balancers should look elsewhere."""
        self.ready = False

    def application(self) -> web.Application:
        """Routes."""
        application = web.Application(middlewares=[_headers])
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/metrics", self._metrics),
                web.get("/-/healthy", self._healthy),
                web.get("/-/ready", self._is_ready),
                web.get("/api/v1/runs", self._list),
                web.get("/api/v1/runs/{run}", self._run),
                web.get("/api/v1/runs/{run}/steps", self._steps),
                web.get("/api/v1/runs/{run}/incidents/{id}", self._incident),
                web.get("/runbooks", self._runbooks),
                web.get("/runbooks/{alert}", self._runbook),
            ]
        )
        return application

    async def _index(self, _: web.Request) -> web.Response:
        return web.Response(text=_INDEX)

    async def _metrics(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._rendered[0] >= self._cache_seconds:
            # Two Prometheus servers share one rendering. Level 1: level 9 costs as much as the rendering itself.
            body = generate_latest(self._registry)
            self._rendered = (time.monotonic(), body, gzip.compress(body, 1))
        _, body, compressed = self._rendered
        headers = {"Content-Type": CONTENT_TYPE_LATEST, "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            return web.Response(body=compressed, headers=headers | {"Content-Encoding": "gzip"})
        return web.Response(body=body, headers=headers)

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="healthy\n")

    async def _is_ready(self, _: web.Request) -> web.Response:
        return web.Response(text="ready\n") if self.ready else web.Response(text="not ready\n", status=503)

    async def _list(self, _: web.Request) -> web.Response:
        return _json({"runs": [self._brief(run) for run in self._runs]})

    async def _run(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = run.newest
        model, optimizer = attempt.model, attempt.hello.optimizer
        return _json(
            {
                **self._brief(run),
                "counters": {**run.totals.counters, "nonfinite": run.totals.nonfinite, "dropped": run.totals.dropped},
                "attempts": [_attempt(each) for each in run.attempts],
                "ranks": [_rank(instance) for _, instance in sorted(attempt.instances.items())],
                "events": list(run.events),
                "incidents": list(run.incidents),
                "model": {
                    "type": model.type,
                    "module_types": model.module_types,
                    "parameters": len(model.parameters),
                    "elements": sum(model.parameter_sizes),
                    "layers": model.layers,
                },
                "optimizer": {"type": optimizer.type, "fused": optimizer.fused},
                "clip": attempt.hello.clip,
                "versions": dict(attempt.hello.versions),
            }
        )

    async def _steps(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = _number(request, "attempt", run.newest.number)
        after = _number(request, "after", 0)
        limit = min(_number(request, "limit", 1000), _MOST_STEPS)
        if attempt >= len(run.attempts):
            raise _error(web.HTTPNotFound, f"run {run.name!r} has no attempt {attempt}")
        columns = self._store.steps(run.name, attempt=attempt, after=after, limit=limit)
        norms = _local_norms(run.attempts[attempt], columns["sequence"])
        return _json({"attempt": attempt, **columns, "local_norm": norms})

    async def _incident(self, request: web.Request) -> web.Response:
        run = self._find(request)
        for incident in run.incidents:
            if str(incident["id"]) == request.match_info["id"]:
                records = self._store.incident_records(run.name, incident["id"])
                return _json({**incident, "records": records})
        raise _error(web.HTTPNotFound, f"run {run.name!r} has no incident {request.match_info['id'][:80]!r}")

    async def _runbooks(self, _: web.Request) -> web.Response:
        names = sorted(path.stem for path in shipped("runbooks").glob("*.md"))
        return web.Response(text="".join(f"/runbooks/{name}\n" for name in names))

    async def _runbook(self, request: web.Request) -> web.Response:
        # Looked up among the names that there are: a path from outside opens no file.
        for path in shipped("runbooks").glob("*.md"):
            if path.stem == request.match_info["alert"]:
                return web.Response(text=path.read_text(encoding="utf-8"))
        raise _error(web.HTTPNotFound, f"there is no runbook {request.match_info['alert'][:80]!r}")

    def _find(self, request: web.Request) -> Run:
        name = request.match_info["run"]
        run = self._runs.get(name)
        if run is None:
            raise _error(web.HTTPNotFound, f"there is no run {name[:200]!r}; /api/v1/runs lists them")
        return run

    def _brief(self, run: Run) -> dict[str, Any]:
        attempt = run.newest
        newest = run.incidents[-1] if run.incidents else None
        return {
            "run": run.name,
            "experiment": run.experiment,
            "state": "active" if run.active(self._clock(), self._silent) else "ended",
            "attempt": attempt.number,
            "started_seconds": attempt.started_seconds,
            "world_size": attempt.world_size,
            "ranks_reporting": sum(instance.reporting for instance in attempt.instances.values()),
            "verdict": newest["verdict"]["cause"] if newest else "healthy",
            "failing": attempt.detector.failing,
            "building_up": attempt.detector.gradient.in_build_up,
            "newest": run.totals.levels,
            "last_report_seconds": run.last_heard(),
            "last_step_seconds": run.totals.last["step"],
            "stall_after_seconds": run.totals.stall_after(),
        }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "launch": attempt.launch,
        "started_seconds": attempt.started_seconds,
        "world_size": attempt.world_size,
        "steps": attempt.settled,
        "over": attempt.over,
        "incident": attempt.incident,
    }


def _rank(instance: Instance) -> dict[str, Any]:
    return {
        "rank": instance.rank,
        "node": instance.node,
        "pid": instance.pid,
        "instance": instance.name,
        "state": instance.state,
        "detail": instance.detail,
        "last_report_seconds": instance.last_report,
        "stored": instance.stored,
        "last_step": instance.last_step,
        "last_complete": instance.last_finished,
        "local_norm": instance.local_norm,
        "loss": instance.loss,
        "dropped": instance.dropped,
    }


def _local_norms(attempt: Attempt, sequences: list[int]) -> dict[str, list[Any]] | None:
    """By rank, a column each, as far as they are at hand; None of an attempt that rests, or has too many ranks."""
    if attempt.resting or attempt.world_size > _MOST_RANK_COLUMNS:
        return None
    table = attempt.board.local_norms(np.array(sequences, np.int64))
    return {str(rank): table[:, rank].tolist() for rank in sorted(attempt.instances)}


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 15:
        raise _error(web.HTTPBadRequest, f"{name} must be a whole number, not {text[:80]!r}")
    return int(text)


def _error(kind: type[web.HTTPException], text: str) -> web.HTTPException:
    return kind(text=json.dumps({"error": text}), content_type="application/json")


@web.middleware
async def _headers(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        error.headers.update(_HEADERS)
        raise
    response.headers.update(_HEADERS)
    return response


def _json(value: Any) -> web.Response:
    return web.json_response(text=json.dumps(_strict(value), allow_nan=False))


def _strict(value: Any) -> Any:
    """JSON has no NaN: null in its place, and "nan", "inf" or "-inf" where nothing beside it says which."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
