"""The HTTP side put together: metrics, health, and the parts for machines, for people, and for what is live."""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_collector.web.api import Api, error
from foreshock_collector.web.live import Live
from foreshock_collector.web.page import Page

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer, where it does not say otherwise itself."""


class Pages:
    """Serves every route, and `/metrics` and health checks itself. Changes nothing."""

    def __init__(
        self,
        *,
        runs: Runs,
        store: Store,
        registry: CollectorRegistry,
        clock: Callable[[], float],
        silent: float,
        cache_seconds: float,
        storing: Callable[[], bool],
    ) -> None:
        """storing: commits work."""
        self._runs = runs
        self._storing = storing
        self._registry = registry
        self._cache_seconds = cache_seconds
        self._rendered: tuple[float, bytes, bytes] = (-math.inf, b"", b"")
        self._api = Api(runs=runs, store=store, clock=clock, silent=silent)
        self._live = Live(runs=runs, clock=clock, silent=silent)
        self._page = Page(runs=runs)
        self.ready = False
        """Records are taken in."""

    def drain(self) -> None:
        """No more records are taken in: load balancers should look elsewhere."""
        self.ready = False

    def application(self) -> web.Application:
        """Routes."""
        application = web.Application(middlewares=[_headers, self._failures])
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/-/healthy", self._healthy),
                web.get("/-/ready", self._is_ready),
                *self._api.routes(),
                *self._live.routes(),
                *self._page.routes(),
            ]
        )
        application.on_shutdown.append(self._live.end)
        return application

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
        if not self.ready:
            return web.Response(text="not ready\n", status=503)
        if not self._storing():
            return web.Response(text="not ready: nothing can be stored, see the log\n", status=503)
        return web.Response(text="ready\n")

    @web.middleware
    async def _failures(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """An answer that fails costs nothing else: it is counted where it belongs."""
        try:
            response: web.StreamResponse = await handler(request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as failure:
            run = self._runs.get(request.match_info.get("run", ""))
            (self._runs if run is None else run).errors.add("page", failure)
            raise error(web.HTTPInternalServerError, "the collector failed on this request; see its log") from failure
        return response


@web.middleware
async def _headers(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as answer:
        answer.headers.update({name: value for name, value in _HEADERS.items() if name not in answer.headers})
        raise
    if not response.prepared:
        response.headers.update({name: value for name, value in _HEADERS.items() if name not in response.headers})
    return response
