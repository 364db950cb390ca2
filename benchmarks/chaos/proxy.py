"""A TCP proxy in front of a collector, whose connections can be cut, delayed and swallowed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

_CHUNK_BYTES = 65536


class Proxy:
    """Forwards connections to a port of this machine, from a thread of its own."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._delay = 0.0
        self._asks, self._answers = asyncio.Event(), asyncio.Event()
        self._asks.set()
        self._answers.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._ask(self._listen())

    def cut(self) -> None:
        """Reset all connections."""
        self._call(self._abort)

    def delay(self, seconds: float) -> None:
        """Hold each piece of data for so long before it goes on."""
        self._delay = seconds

    def swallow(self, on: bool) -> None:
        """Accept connections and data, and pass nothing on while this is on: a black hole."""
        self._call(self._asks.clear if on else self._asks.set)
        self.swallow_answers(on)

    def swallow_answers(self, on: bool) -> None:
        """Pass on what is sent to the port and nothing that comes back while this is on: half-open."""
        self._call(self._answers.clear if on else self._answers.set)

    def close(self) -> None:
        """End all connections and the thread."""
        self._ask(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _call(self, function: Callable[[], Any]) -> None:
        async def call() -> None:
            function()

        self._ask(call())

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _close(self) -> None:
        self._server.close()
        self._asks.set()
        self._answers.set()
        self._abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(
                self._forward(reader, far_writer, self._asks), self._forward(far_reader, writer, self._answers)
            )
        finally:
            for each in (writer, far_writer):
                self._writers.discard(each)
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await passes.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
