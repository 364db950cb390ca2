"""The HTTP server: /metrics, health, the API, the stream of changes, and the page."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics

from foreshock_collector.access.tokens import Tokens
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_collector.web.api import Api, json_error
from foreshock_collector.web.authorization import token_required
from foreshock_collector.web.connections import Connections
from foreshock_collector.web.hosts import only_hosts
from foreshock_collector.web.live import ChangeStreams
from foreshock_collector.web.page import Page

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every response, unless it sets them itself."""
_PART_SECONDS = 0.03
"""Of a rendering of /metrics: nothing else happens meanwhile."""


class Render(Protocol):
    """Renders the text of /metrics."""

    def __call__(self, *, as_openmetrics: bool) -> Iterator[bytes]:
        """Yield the text in parts, as they are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendering:
    """Holds a text of /metrics for all who ask soon after."""

    seconds: float
    """When its rendering began, by `time.monotonic`."""
    commits: int
    """Urgent commits by then."""
    body: bytes
    compressed: bytes


class WebApplication:
    """Puts all routes together, and serves /metrics and health itself. Nothing here changes any state.

    render: yields the text of /metrics, as OpenMetrics if `as_openmetrics`. urgent_commits: returns how often the
    state changed so that it should be seen at once. storing: returns whether commits succeed. hosts: names that
    requests may use, beside addresses; None: any. tokens: who may read; None: everybody.
    """

    def __init__(
        self,
        *,
        runs: Runs,
        store: Store,
        render: Render,
        clock: Callable[[], float],
        silent: float,
        cache_seconds: float,
        urgent_commits: Callable[[], int],
        storing: Callable[[], bool],
        hosts: frozenset[str] | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self._runs = runs
        self._storing = storing
        self._hosts = hosts
        self._tokens = tokens
        self._render = render
        self._rendering = asyncio.Lock()
        self._cache_seconds = cache_seconds
        self._urgent_commits = urgent_commits
        self._rendered: dict[bool, _Rendering] = {}
        """By whether it is in the format of OpenMetrics."""
        self._api = Api(runs=runs, store=store, clock=clock, silent=silent)
        self._live = ChangeStreams(runs=runs, clock=clock, silent=silent, tokens=tokens)
        self._page = Page(runs=runs)
        self.connections = Connections()
        """Connections of its clients."""
        self.ready = False
        """Whether records are accepted."""

    def drain(self) -> None:
        """Stop being ready, so that load balancers use another collector."""
        self.ready = False

    def as_aiohttp(self) -> web.Application:
        """Return the application with all routes."""
        checks = [] if self._hosts is None else [only_hosts(self._hosts)]
        checks += [] if self._tokens is None else [token_required(self._tokens, self._runs)]
        middlewares = [self.connections.middleware(), _headers, *checks, self._count_failures]
        application = web.Application(middlewares=middlewares)
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/-/healthy", self._healthy),
                web.get("/-/ready", self._ready),
                *self._api.routes(),
                *self._live.routes(),
                *self._page.routes(),
            ]
        )
        application.on_shutdown.append(self._live.end)
        return application

    async def _metrics(self, request: web.Request) -> web.Response:
        _, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
        as_openmetrics = content_type.startswith("application/openmetrics-text")
        # Two Prometheus servers share one rendering, and the second waits for it.
        async with self._rendering:
            commits, now = self._urgent_commits(), time.monotonic()
            known = self._rendered.get(as_openmetrics)
            if known is None or now - known.seconds >= self._cache_seconds or known.commits != commits:
                known = self._rendered[as_openmetrics] = await self._render_in_turns(as_openmetrics)
        form = openmetrics if as_openmetrics else exposition
        headers = {"Content-Type": form.CONTENT_TYPE_LATEST, "Vary": "Accept, Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            return web.Response(body=known.compressed, headers=headers | {"Content-Encoding": "gzip"})
        return web.Response(body=known.body, headers=headers)

    async def _render_in_turns(self, as_openmetrics: bool) -> _Rendering:
        """Render, and let others have their turn meanwhile: records are taken, and runs committed."""
        began, commits, body = time.monotonic(), self._urgent_commits(), b""
        turn = began
        for part in self._render(as_openmetrics=as_openmetrics):
            body += part
            if time.monotonic() - turn >= _PART_SECONDS:
                await asyncio.sleep(0)
                turn = time.monotonic()
        # Level 1: level 9 costs as much as the rendering itself.
        compressed = await asyncio.to_thread(gzip.compress, body, 1)
        return _Rendering(seconds=began, commits=commits, body=body, compressed=compressed)

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="healthy\n")

    async def _ready(self, _: web.Request) -> web.Response:
        if not self.ready:
            return web.Response(text="not ready\n", status=503)
        if not self._storing():
            return web.Response(text="not ready: cannot commit, see the log\n", status=503)
        return web.Response(text="ready\n")

    @web.middleware
    async def _count_failures(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Count a handler that fails as an error of its run, or of the collector."""
        try:
            response: web.StreamResponse = await handler(request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as failure:
            run = self._runs.in_memory(request.match_info.get("run", ""))
            (self._runs if run is None else run).errors.add("page", failure)
            raise json_error(
                web.HTTPInternalServerError, "the collector failed on this request; see its log"
            ) from failure
        return response


@web.middleware
async def _headers(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as failure:
        failure.headers.update({name: value for name, value in _HEADERS.items() if name not in failure.headers})
        raise
    if not response.prepared:
        response.headers.update({name: value for name, value in _HEADERS.items() if name not in response.headers})
    return response
