"""A gRPC relay in front of a collector that can repeat, replay and exchange the batches of a stream."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

import grpc

from foreshock_protos.v1 import telemetry_pb2 as pb

_PATH = "/foreshock.v1.Telemetry/Stream"
_REPLAYED = 8
"""Newest batches that may come once more."""


class Relay:
    """Passes the streams of recorders on to a collector, from a thread of its own."""

    def __init__(self, address: str) -> None:
        """address: host:port of the collector."""
        self._address = address
        self._scrambles = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._ask(self._listen())

    def scramble(self, on: bool) -> None:
        """While this is on: exchange each batch with the next, and follow them with an old one."""
        self._scrambles = on

    def close(self) -> None:
        """End all streams and the thread."""
        self._ask(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        # Until its last object is gone, grpc.aio calls the loops of all of them, closed or not.
        del self._server
        gc.collect()
        self._loop.close()

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> int:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        services = grpc.method_handlers_generic_handler("foreshock.v1.Telemetry", {"Stream": handler})
        self._server.add_generic_rpc_handlers((services,))
        port = int(self._server.add_insecure_port("127.0.0.1:0"))
        await self._server.start()
        return port

    async def _close(self) -> None:
        await self._server.stop(None)
        # It does not wait for what its handlers still do.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async with grpc.aio.insecure_channel(self._address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
            call = channel.stream_stream(_PATH)(metadata=context.invocation_metadata())
            sending = asyncio.create_task(self._send(requests, call))
            try:
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", error.trailing_metadata() or ())
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, requests: AsyncIterator[bytes], call: Any) -> None:
        held: bytes | None = None
        newest: deque[bytes] = deque(maxlen=_REPLAYED)
        # Where the stream has ended, the reading side knows why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async for data in requests:
                batch = pb.FromRecorder.FromString(data).WhichOneof("message") in ("steps", "block")
                if batch:
                    newest.append(data)
                if batch and self._scrambles and held is None:
                    held = data
                    continue
                await call.write(data)
                if held is not None:
                    await call.write(held)
                    held = None
                    await call.write(random.choice(newest))
            await call.done_writing()
