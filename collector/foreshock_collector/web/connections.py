"""HTTP connections on which no request comes: they end, so that neither silent nor slow clients shut others out."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

BEGIN_SECONDS = 10.0
"""How long a new connection may take to send its first request, TLS handshake and headers included."""
IDLE_SECONDS = 75.0
"""How long a client may neither take in more of its answer nor send a request. Prometheus scrapes more often."""
ANSWER_SECONDS = 600.0
"""How long a client may take for one answer, however steadily it reads: 100 MB at 170 kB a second."""
MOST_WAITING = 512
"""Open connections that wait for a request at the same time; one more ends the oldest of them."""
SWEEP_SECONDS = 1.0
_ACKNOWLEDGED = struct.Struct("=120xQ")
"""tcpi_bytes_acked in struct tcp_info of linux/tcp.h."""


class Connections:
    """Makes the protocol of each connection, and ends those on which no request comes in time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # By the time since which they wait, the oldest first.
        self._new: dict[web.RequestHandler, float] = {}
        self._idle: dict[web.RequestHandler, tuple[float, int, float]] = {}
        """With how much of their answers they have taken in, and since when they could."""

    @property
    def waiting(self) -> list[web.RequestHandler]:
        """Open connections that wait for a request; of too many, the first end."""
        return [protocol for protocol in (*self._new, *self._idle) if protocol.connected]

    def factory(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """Return what a listening socket makes the protocol of a connection with."""

        def make() -> asyncio.Protocol:
            self._limit(MOST_WAITING - 1)
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
                    now = self._monotonic()
                    self._idle[protocol] = now, 0, now

        return note

    async def sweep(self) -> None:
        """End connections that have waited too long, about once a second. Runs until canceled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.end_late()

    def end_late(self) -> None:
        """End connections that have waited too long, or that are too many, and forget those that are closed."""
        now = self._monotonic()
        for protocol, since in [*self._new.items()]:
            if protocol.connected and now - since >= BEGIN_SECONDS:
                self._end(protocol)
            elif now - since >= 2 * BEGIN_SECONDS:
                # Closed: a TLS handshake, in which it is not connected yet, would be over.
                del self._new[protocol]
        for protocol, (since, taken, answered) in [*self._idle.items()]:
            if not protocol.connected:
                del self._idle[protocol]
            elif now - answered >= ANSWER_SECONDS:
                self._end(protocol)
            elif (newly := bytes_taken(protocol)) != taken:
                del self._idle[protocol]
                self._idle[protocol] = now, newly, answered
            elif now - since >= IDLE_SECONDS:
                self._end(protocol)
        self._limit(MOST_WAITING)

    def _limit(self, most: int) -> None:
        if len(self._new) + len(self._idle) > most:
            waiting = self.waiting
            for protocol in waiting[: max(0, len(waiting) - most)]:
                self._end(protocol)

    def _end(self, protocol: web.RequestHandler) -> None:
        self._new.pop(protocol, None)
        self._idle.pop(protocol, None)
        assert protocol.transport is not None
        # Not closed: that would wait for a client that never reads.
        protocol.transport.abort()


def bytes_taken(protocol: web.RequestHandler) -> int:
    """Return how many bytes the client's machine has acknowledged. With TLS, a transport's buffers do not show this."""
    assert protocol.transport is not None
    connection = protocol.transport.get_extra_info("socket")
    try:
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
    except OSError:
        return 0  # it is closing
    (count,) = _ACKNOWLEDGED.unpack(information)
    return int(count)
