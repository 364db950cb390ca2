"""Server-sent events that tell the page when to fetch from the API again."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from foreshock_collector.access.tokens import Tokens
from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.web.authorization import validity

_CHECK_SECONDS = 0.2
"""How often a stream checks for changes: well under a second, which people perceive as immediate."""
_HEARTBEAT_SECONDS = 10.0
"""Longest pause between two events: without any, the page takes the stream for broken."""
_SHARED_SECONDS = _CHECK_SECONDS / 2
"""How long one look at all runs serves every viewer. Of 200 runs it takes 1.5 ms: 256 viewers would take two cores."""
_MOST_STREAMS = 256
"""Further viewers have to poll."""


class ChangeStreams:
    """Serves a stream of events to each viewer.

    tokens: who may read; None: everybody. clock: Unix time; monotonic: seconds.
    """

    def __init__(
        self,
        *,
        runs: Runs,
        clock: Callable[[], float],
        silent: float,
        tokens: Tokens | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs = runs
        self._clock = clock
        self._silent = silent
        self._tokens = tokens
        self._monotonic = monotonic
        self._all_runs: tuple[float, list[Any]] = (-math.inf, [])
        """When all runs were looked at last, and what was seen."""
        self._streams = 0
        self._ending = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """Return the route: /api/v1/live for all runs, with ?run= for one."""
        return [web.get("/api/v1/live", self._stream)]

    async def end(self, _: web.Application) -> None:
        """End all streams: the collector is about to stop."""
        self._ending.set()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= _MOST_STREAMS or self._ending.is_set():
            return web.Response(status=503, text="no more streams: poll\n")
        name = request.query.get("run")
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        # Before anything is awaited: others may come meanwhile.
        self._streams += 1
        try:
            await response.prepare(request)
            await self._send_changes(response, name, validity(request, self._tokens))
        except ConnectionError:
            pass  # the viewer has left
        finally:
            self._streams -= 1
        return response

    async def _send_changes(
        self, response: web.StreamResponse, name: str | None, still_allowed: Callable[[], bool]
    ) -> None:
        sent: Any = None
        idle = 0.0
        while still_allowed() and not self._ending.is_set():
            current = self.fingerprints(name)
            if current != sent or idle >= _HEARTBEAT_SECONDS:
                kind = "change" if current != sent else "heartbeat"
                data = json.dumps({"now_seconds": self._clock()})
                await response.write(f"event: {kind}\ndata: {data}\n\n".encode())
                sent, idle = current, 0.0
            idle += _CHECK_SECONDS
            # No plain sleep: a collector that stops ends its streams at once.
            try:
                await asyncio.wait_for(self._ending.wait(), _CHECK_SECONDS)
            except TimeoutError:
                continue

    def fingerprints(self, name: str | None) -> Any:
        """Return a value that differs after a change of this run, or of any for None."""
        if name is None:
            now = self._monotonic()
            if now - self._all_runs[0] >= _SHARED_SECONDS:
                self._all_runs = now, [self._fingerprint(run) for run in self._runs]
            return self._all_runs[1]
        if name in self._runs.archived:
            return name
        run = self._runs.in_memory(name)
        return None if run is None else self._fingerprint(run)

    def _fingerprint(self, run: Run) -> tuple[Any, ...]:
        return run.errors.value("page", (run.name, "errors"), self._visible_state, run)

    def _visible_state(self, run: Run) -> tuple[Any, ...]:
        """Return a value that differs whenever the API would answer differently, the time of the last report aside."""
        if run.evicted:
            # Thousands of ended runs must cost next to nothing.
            return run.name, len(run.attempts)
        attempt = run.newest
        incident, event = run.incidents.newest, run.events.newest
        return (
            run.name,
            attempt.number,
            run.totals.counters["steps"],
            condition(run, self._clock(), self._silent),
            event and event.seen_seconds,
            incident and (incident.number, incident.closed_seconds, incident.verdict.cause),
            sum(instance.reporting for instance in attempt.instances.values()),
            len(attempt.instances),
            bool(run.errors.nonzero()),
        )
