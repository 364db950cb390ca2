"""The HTTP side: metrics, health, the API as JSON, runbooks."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from foreshock_collector.runs import Instance, Run, Runs
from foreshock_collector.shipped import shipped
from foreshock_collector.store import Store

_CACHE_SECONDS = 1.0
_MOST_STEPS = 10_000
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class Pages:
    """The handlers, and what they read."""

    def __init__(
        self, *, runs: Runs, store: Store, registry: CollectorRegistry, clock: Callable[[], float], silent: float
    ) -> None:
        self._runs = runs
        self._store = store
        self._registry = registry
        self._clock = clock
        self._silent = silent
        self._rendered: tuple[float, bytes] = (-math.inf, b"")
        self.ready = False
        """Becomes true once records are taken in, false again while draining."""

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
                web.get("/runbooks/{alert}", self._runbook),
            ]
        )
        return application

    async def _index(self, _: web.Request) -> web.Response:
        return web.Response(text="Foreshock collector\n/metrics\n/api/v1/runs\n/-/healthy\n/-/ready\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        if now - self._rendered[0] >= _CACHE_SECONDS:
            # Two Prometheus servers share one rendering.
            self._rendered = (now, generate_latest(self._registry))
        body = self._rendered[1]
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, 1)
        return web.Response(body=body, headers=headers)

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="healthy\n")

    async def _is_ready(self, _: web.Request) -> web.Response:
        return web.Response(text="ready\n") if self.ready else web.Response(text="draining\n", status=503)

    async def _list(self, _: web.Request) -> web.Response:
        return _json({"runs": [self._brief(run) for run in self._runs]})

    async def _run(self, request: web.Request) -> web.Response:
        run = self._find(request)
        model = run.model
        newest = run.newest()
        return _json(
            {
                **self._brief(run),
                "counters": {**run.counters, "nonfinite": run.nonfinite, "dropped": run.dropped},
                "attempts": len(run.launches),
                "ranks": [_rank(instance) for instance in newest],
                "events": [asdict(event) for event in run.events],
                "incidents": run.incidents,
                "model": {"type": model.type, "module_types": model.module_types, "layers": model.layers},
                "clip": newest[0].hello.clip if newest else "",
            }
        )

    async def _steps(self, request: web.Request) -> web.Response:
        run = self._find(request)
        try:
            attempt = int(request.query.get("attempt", len(run.launches) - 1))
            after = int(request.query.get("after", -1))
            limit = min(int(request.query.get("limit", 1000)), _MOST_STEPS)
        except ValueError as error:
            return _json({"error": f"attempt, after and limit must be whole numbers: {error}"}, status=400)
        return _json({"attempt": attempt, **self._store.steps(run.name, attempt=attempt, after=after, limit=limit)})

    async def _runbook(self, request: web.Request) -> web.Response:
        alert = request.match_info["alert"]
        if alert not in {path.stem for path in shipped("runbooks").glob("*.md")}:
            return _json({"error": f"there is no runbook {alert[:80]!r}"}, status=404)
        return web.Response(text=(shipped("runbooks") / f"{alert}.md").read_text())

    def _find(self, request: web.Request) -> Run:
        name = request.match_info["run"]
        run = self._runs.get(name)
        if run is None:
            text = json.dumps({"error": f"there is no run {name[:200]!r}; /api/v1/runs lists them"})
            raise web.HTTPNotFound(text=text, content_type="application/json")
        return run

    def _brief(self, run: Run) -> dict[str, Any]:
        now = self._clock()
        verdict = run.incidents[-1]["verdict"]["cause"] if run.incidents else "healthy"
        return {
            "run": run.name,
            "experiment": run.experiment,
            "state": "active" if run.active(now, self._silent) else "ended",
            "attempt": len(run.launches) - 1,
            "world_size": run.world_size(len(run.launches) - 1),
            "verdict": verdict,
            "failing": run.detector.failing,
            "building_up": run.detector.gradient.in_build_up,
            "newest": run.levels,
            "last_report_seconds": run.last_heard(),
        }


def _rank(instance: Instance) -> dict[str, Any]:
    row = instance.last_row
    return {
        "rank": instance.rank,
        "node": instance.hello.topology.node,
        "state": "lost" if instance.lost else instance.closed.lower() or "there",
        "last_report_seconds": instance.last_report,
        "stored": instance.position,
        "last_step": None if row is None else row.step,
        "last_complete": None if row is None else row.complete,
        "local_norm": None if row is None else row.local_norm,
        "loss": None if row is None else row.loss,
    }


@web.middleware
async def _headers(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    for name, value in _HEADERS.items():
        response.headers[name] = value
    return response


def _json(value: Any, *, status: int = 200) -> web.Response:
    return web.json_response(text=json.dumps(_strict(value), allow_nan=False), status=status)


def _strict(value: Any) -> Any:
    """JSON has no NaN: not finite numbers become "nan", "inf", "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
