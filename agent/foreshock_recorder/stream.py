"""One stream to the collector: the recorder's use of gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from foreshock_protos.retry import retry_seconds
from foreshock_protos.text import escaped
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub
from foreshock_recorder.credentials import CredentialsError, open_channel, token_metadata

ANSWER_SECONDS = 10.0
"""A collector that has not answered for so long after a message is taken for dead."""
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
_LOST_STATUS = "Internal error from Core"
"""What grpc.aio reports where a write meets a stream that the other side is just ending: the true status is lost."""

Send = Callable[[pb.FromRecorder], Awaitable[None]]
"""Sends one message. Waits while the collector takes nothing in."""


class UnreachableError(Exception):
    """The collector is unreachable, disconnected or too busy; the message says why."""

    def __init__(self, text: str, *, retry_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.retry_seconds = retry_seconds
        """After which the collector asks to try again; 0: it does not."""


class RefusedError(Exception):
    """The collector refuses this stream, in the words of the message. Trying again soon changes nothing."""


async def run_stream(
    address: str, send_messages: Callable[[Send], Awaitable[None]], on_ack: Callable[[pb.Ack], None]
) -> None:
    """Open a stream, let `send_messages` send and `on_ack` take answers, until the collector ends it in good order.

    address: host:port. Raises `UnreachableError` or `RefusedError`, and what the two callbacks raise.
    """
    loop = asyncio.get_running_loop()
    proxy = os.environ.get("FORESHOCK_HTTP_PROXY") == "1"
    # gRPC would obey http_proxy even for 127.0.0.1; and channels of one process would share its waits to reconnect.
    options = (("grpc.enable_http_proxy", int(proxy)), ("grpc.use_local_subchannel_pool", 1))
    try:
        opened, metadata = open_channel(address, options), token_metadata()
    except CredentialsError as error:
        raise RefusedError(str(error)) from error
    async with opened as channel:
        call = TelemetryStub(channel).Stream(metadata=metadata)  # type: ignore[no-untyped-call]

        async def send(message: pb.FromRecorder) -> None:
            if patience.when() is None:
                patience.reschedule(loop.time() + ANSWER_SECONDS)
            await call.write(message)

        async def write() -> None:
            # Where the stream has ended, the reading side knows why.
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await send_messages(send)

        async def read() -> None:
            async for ack in call:
                patience.reschedule(None)
                on_ack(_printable(ack))

        tasks: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(ANSWER_SECONDS) as patience:
                writing, reading = tasks = [asyncio.create_task(write()), asyncio.create_task(read())]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    writing.result()
                await reading
        except TimeoutError:
            raise UnreachableError(f"no answer for {ANSWER_SECONDS:g} s") from None
        except grpc.aio.AioRpcError as error:
            text = escaped(error.details() or error.code().name)
            if error.code() is grpc.StatusCode.INTERNAL and text.startswith(_LOST_STATUS):
                text = "the collector has ended the stream"
            if error.code() in _REFUSALS:
                raise RefusedError(text) from None
            busy = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            seconds = retry_seconds(error.trailing_metadata()) if busy else None
            raise UnreachableError(text, retry_seconds=seconds or 0.0) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _printable(ack: pb.Ack) -> pb.Ack:
    """Return the message with texts that a rank may print: its terminal is not the collector's to control."""
    ack.page_url = escaped(ack.page_url)
    for position in ack.positions:
        position.run, position.refused = escaped(position.run), escaped(position.refused)
        position.notice = escaped(position.notice)
    return ack
