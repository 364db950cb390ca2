"""Server-sent events: a word to the page whenever there is something new. What is new it fetches from the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run

_LOOK_SECONDS = 0.2
"""How often a stream looks for news. Well under the second in which a person calls something immediate."""
_WORD_SECONDS = 10.0
"""A word at least so often: the page then knows that silence is not news."""
_MOST_STREAMS = 256
"""More viewers than that poll."""


class Live:
    """Streams news to every viewer."""

    def __init__(self, *, runs: Runs, clock: Callable[[], float], silent: float) -> None:
        self._runs = runs
        self._clock = clock
        self._silent = silent
        self._streams = 0
        self._ending = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """/api/v1/live, of all runs or with ?run= of one."""
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
        await response.prepare(request)
        self._streams += 1
        try:
            await self._send_news(response, name)
        except ConnectionError:
            pass  # the viewer has left
        finally:
            self._streams -= 1
        return response

    async def _send_news(self, response: web.StreamResponse, name: str | None) -> None:
        sent: Any = None
        quiet = 0.0
        while not self._ending.is_set():
            news = self._news(name)
            if news != sent or quiet >= _WORD_SECONDS:
                kind = "news" if news != sent else "word"
                data = json.dumps({"now_seconds": self._clock()})
                await response.write(f"event: {kind}\ndata: {data}\n\n".encode())
                sent, quiet = news, 0.0
            quiet += _LOOK_SECONDS
            try:
                await asyncio.wait_for(self._ending.wait(), _LOOK_SECONDS)
            except TimeoutError:
                continue

    def _news(self, name: str | None) -> Any:
        if name is None:
            return [self._news_of(run) for run in self._runs]
        run = self._runs.get(name)
        return None if run is None else self._news_of(run)

    def _news_of(self, run: Run) -> tuple[Any, ...]:
        return run.errors.value("page", (run.name, "errors"), self._state, run)

    def _state(self, run: Run) -> tuple[Any, ...]:
        """Differs as soon as the API would tell something else of this run than the time of its last word."""
        if run.evicted:
            # At rest, or only greeted. Thousands of old runs must cost next to nothing.
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
