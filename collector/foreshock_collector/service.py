"""The gRPC side: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from foreshock_collector.intake import Intake, RefusedError, UnknownVersionError
from foreshock_protos.v1 import telemetry_pb2 as pb

MAX_MESSAGE_BYTES = 4 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The defaults turn away a quarter of 4,096 recorders that come back at once.
    ("grpc.server.max_pending_requests", 16384),
    ("grpc.server.max_pending_requests_hard_limit", 32768),
    # Its windows grow until a stalled handler has buffered 4 MiB a stream.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.so_reuseport", 0),
)


class Telemetry:
    """One stream per recorder. Acknowledges about once a second, and only what is committed."""

    def __init__(self, intake: Intake, epoch: str, *, ack_seconds: float, page_url: Callable[[], str]) -> None:
        self._intake = intake
        self._epoch = epoch
        self._ack_seconds = ack_seconds
        self._page_url = page_url
        self._committed = asyncio.Condition()
        self._draining = False

    async def committer(self) -> None:
        """Commit about once a second, at once on trouble, and let the streams acknowledge. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(0.05)
            self._intake.settle()
            if self._intake.urgent or loop.time() - last >= self._ack_seconds:
                last = loop.time()
                await self.commit()

    async def commit(self) -> None:
        """Commit now, and let the streams acknowledge."""
        self._intake.commit()
        async with self._committed:
            self._committed.notify_all()

    async def drain(self) -> None:
        """Commit, let every stream send its last acknowledgement, and end them."""
        self._draining = True
        await self.commit()

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.Ack]:
        """Handle one recorder."""
        instances: set[str] = set()
        reader = asyncio.create_task(self._read(requests, context, instances))
        try:
            while not reader.done() and not self._draining:
                waiter = asyncio.create_task(self._next_commit())
                await asyncio.wait((reader, waiter), return_when=asyncio.FIRST_COMPLETED)
                if not waiter.done():
                    waiter.cancel()
                    break
                if instances:
                    yield self._ack(instances)
            if not self._draining:
                await reader
                self._intake.commit()
            if instances:
                yield self._ack(instances)
        finally:
            reader.cancel()

    async def _next_commit(self) -> None:
        async with self._committed:
            await self._committed.wait()

    async def _read(self, requests: AsyncIterator[bytes], context: Any, instances: set[str]) -> None:
        async for data in requests:
            try:
                message = pb.FromRecorder.FromString(data)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a foreshock.v1.FromRecorder message")
                return
            try:
                self._take(message, instances)
            except UnknownVersionError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except RefusedError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _take(self, message: pb.FromRecorder, instances: set[str]) -> None:
        which = message.WhichOneof("message")
        if which == "hello":
            instances.add(self._intake.hello(message.hello))
        elif which == "steps":
            self._intake.steps(message.steps)
        elif which == "event":
            self._intake.event(message.event)
        elif which == "goodbye":
            self._intake.goodbye(message.goodbye)
        else:
            raise RefusedError("the message is empty")

    def _ack(self, instances: set[str]) -> pb.Ack:
        return pb.Ack(
            epoch=self._epoch,
            positions=[self._intake.position(instance) for instance in sorted(instances)],
            flow=pb.FlowControl(flush_interval_seconds=self._ack_seconds, max_batch_steps=512),
            page_url=self._page_url(),
        )


def make_server(telemetry: Telemetry) -> Any:
    """A grpc.aio server that serves it. Messages are decoded here, so that a bad one gets a clear status."""
    server = grpc.aio.server(options=_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(
        telemetry.stream, request_deserializer=None, response_serializer=pb.Ack.SerializeToString
    )
    services = {"Stream": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("foreshock.v1.Telemetry", services),))
    return server
