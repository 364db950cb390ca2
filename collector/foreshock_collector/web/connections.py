"""HTTP connections on which no request comes: they end, so that neither silent nor slow clients shut others out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

BEGIN_SECONDS = 10.0
"""How long a new connection may take to send its first request, headers included."""
IDLE_SECONDS = 75.0
"""How long an answer may take to be read, and the next request to come. Prometheus scrapes more often."""
MOST_WAITING = 512
"""Connections that wait for a request at the same time; one more ends the oldest of them."""
SWEEP_SECONDS = 1.0


class Connections:
    """Makes the protocol of each connection, and ends those on which no request comes in time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # By the time since which they wait, the oldest first.
        self._new: dict[web.RequestHandler, float] = {}
        self._idle: dict[web.RequestHandler, float] = {}

    def factory(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """Return what a listening socket makes the protocol of a connection with."""

        def make() -> asyncio.Protocol:
            if len(self._new) + len(self._idle) >= MOST_WAITING:
                self._forget_closed()
            if len(self._new) + len(self._idle) >= MOST_WAITING:
                waiting = self._new or self._idle
                _end(next(iter(waiting)), waiting)
            protocol = server()
            self._new[protocol] = self._monotonic()
            return protocol

        return make

    def middleware(self) -> Any:
        """Return a middleware that notes which connections have a request."""

        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            protocol = request.protocol
            self._new.pop(protocol, None)
            self._idle.pop(protocol, None)
            try:
                response: web.StreamResponse = await handler(request)
                return response
            finally:
                if protocol.connected:
                    self._idle[protocol] = self._monotonic()

        return note

    def _forget_closed(self) -> None:
        # One that has had no request yet may still be in its TLS handshake, and is then not connected either.
        self._idle = {protocol: since for protocol, since in self._idle.items() if protocol.connected}

    async def sweep(self) -> None:
        """End connections that have waited too long. Runs until canceled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._forget_closed()
            now = self._monotonic()
            for waiting, seconds in ((self._new, BEGIN_SECONDS), (self._idle, IDLE_SECONDS)):
                for protocol in [protocol for protocol, since in waiting.items() if now - since >= seconds]:
                    _end(protocol, waiting)


def _end(protocol: web.RequestHandler, waiting: dict[web.RequestHandler, float]) -> None:
    del waiting[protocol]
    if protocol.transport is not None:
        # Not closed: that would wait for a client that never reads.
        protocol.transport.abort()
