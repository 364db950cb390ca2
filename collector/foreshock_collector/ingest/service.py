"""The gRPC service: decodes messages, applies them, and encodes acknowledgements."""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from foreshock_collector.access.tokens import Tokens, secret_in
from foreshock_collector.ingest.flow import Flow
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import RefusedError, Session
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.retry import retry_metadata
from foreshock_protos.v1 import telemetry_pb2 as pb

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 2**20
_MAX_BATCH_STEPS = 512
_MOST_STREAMS = 8192
"""Streams at the same time, one for each recorder; a single address, be it of a machine or a proxy, may have half."""
_RETRY_SECONDS = 30.0
"""After which the recorder of one stream too many may try again."""
_TICK_SECONDS = 0.05
_TURN_SECONDS = 0.002
"""Between two parts of a commit: an answer over HTTP takes several passes of the event loop, not one."""
_LATE_SECONDS = 1.0
"""After so long, a commit gives way for one pass only: each may take in hundreds of messages."""
_EXPIRY_SECONDS = 10.0
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The defaults reject a quarter of 4,096 recorders that reconnect at once.
    ("grpc.server.max_pending_requests", 16384),
    ("grpc.server.max_pending_requests_hard_limit", 32768),
    # A message that is small on the wire could take a thousand times its size in memory.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # With it, windows grow until a stalled handler has buffered 4 MiB a stream.
    ("grpc.http2.bdp_probe", 0),
    # Connections that say nothing end: those without a stream, and those that never begin.
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Two collectors on one port would split the ranks of a run between them.
    ("grpc.so_reuseport", 0),
)
_CODES = {
    "schema_version": grpc.StatusCode.FAILED_PRECONDITION,
    "token": grpc.StatusCode.UNAUTHENTICATED,
}
"""Status of a stream that is refused, by the reason; INVALID_ARGUMENT for all others."""


class _Stream:
    """One recorder's connection: its session, and the event that makes it send an acknowledgement."""

    def __init__(self, peer: str) -> None:
        self.session = Session(peer)
        self.wake = asyncio.Event()
        self.exited = False
        """Whether the last acknowledgement was of the exit of every rank."""


class Telemetry:
    """Serves one stream per recorder. Acknowledges about once a second, and only what is committed."""

    def __init__(
        self,
        intake: Intake,
        epoch: str,
        *,
        flow: Flow,
        page_url: Callable[[], str],
        tokens: Tokens | None = None,
    ) -> None:
        """tokens: who may write; None: everybody."""
        self._intake = intake
        self._errors = intake.errors
        self._statistics = intake.statistics
        self._epoch = epoch
        self._flow = flow
        self._statistics.flush_seconds = flow.seconds
        self._page_url = page_url
        self._tokens = tokens
        self._streams: set[_Stream] = set()
        self._draining = False

    async def committer(self) -> None:
        """Commit at the flow's interval, urgent runs at once, and let streams acknowledge. Runs until canceled.

        Raises `GoneError` or `sqlite3.DatabaseError` if the database is gone or damaged: only a new one helps.
        """
        loop = asyncio.get_running_loop()
        committed = expired = loop.time()
        while True:
            asleep = loop.time()
            await asyncio.sleep(_TICK_SECONDS)
            now = loop.time()
            self._flow.add_delay(now - asleep - _TICK_SECONDS)
            with self._errors.caught("commit"):
                if now - committed >= self._flow.seconds:
                    committed = now
                    for _ in self._intake.commit_in_parts():
                        await asyncio.sleep(_TURN_SECONDS if loop.time() - now < _LATE_SECONDS else 0)
                    self._flow.adapt(self._statistics.messages)
                    self._statistics.flush_seconds = self._flow.seconds
                    self._wake(self._streams)
                else:
                    waiting = self._intake.commit_urgent()
                    if waiting:
                        self._wake(stream for stream in self._streams if stream.session.includes(waiting))
                if now - expired >= _EXPIRY_SECONDS:
                    expired = now
                    self._intake.expire()
            if self._intake.database_error is not None:
                raise self._intake.database_error

    def drain(self) -> None:
        """Commit, let every stream send its last acknowledgement, and end it."""
        self._draining = True
        self._intake.commit()
        self._wake(self._streams)

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.Ack]:
        """Handle one recorder."""
        stream = _Stream(urllib.parse.unquote(context.peer()))
        session = stream.session
        if self._tokens is not None:
            shown = dict(context.invocation_metadata() or ()).get("authorization", "")
            session.token = self._tokens.find(secret_in(str(shown)), "write")
            if session.token is None:
                self._statistics.refused["token"] += 1
                why = "a token with the right to write is required"
                refusal = {"peer": session.peer, "reason": "token", "why": why}
                logger.warning("refused the stream of %(peer)s: %(why)s", refusal)
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)
        if why := self._limit_reached(session.host):
            self._statistics.refused["limit"] += 1
            refusal = {"peer": session.peer, "reason": "limit", "why": why}
            logger.warning("refused the stream of %(peer)s: %(why)s", refusal)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            await context.abort(code, why, retry_metadata(code.value[0], why, _RETRY_SECONDS))
        reader = asyncio.create_task(self._read(requests, stream))
        self._streams.add(stream)
        self._statistics.streams += 1
        end = "error"
        try:
            while True:
                await stream.wake.wait()
                stream.wake.clear()
                self._check_token(session)
                if reader.done():
                    reader.result()
                    self._intake.commit_session(session)
                if session.registered or session.refused:
                    yield self._ack(stream)
                if reader.done() or self._draining:
                    end = "drained" if self._draining else "closed"
                    return
        except RefusedError as error:
            end = "refused"
            self._statistics.refused[error.reason] += 1
            refusal = {"peer": session.peer, "reason": error.reason, "why": str(error)}
            logger.warning("refused the stream of %(peer)s: %(why)s", refusal)
            await context.abort(_CODES.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT), str(error))
        except (asyncio.CancelledError, GeneratorExit):  # by gRPC, either way
            # A recorder hangs up once all that its ranks have sent is acknowledged.
            end = "drained" if self._draining else "exited" if stream.exited else "disconnected"
            raise
        except Exception as error:
            self._errors.add("ingest", error)
            raise
        finally:
            session.open = False
            self._streams.discard(stream)
            self._statistics.streams -= 1
            if end != "refused":
                facts = {"peer": session.peer, "reason": end, "instances": len(session.registered)}
                logger.info("stream of %(peer)s ended: %(reason)s (ranks: %(instances)d)", facts)
            reader.cancel()
            await asyncio.wait((reader,))

    def _limit_reached(self, host: str) -> str:
        """Return why no further stream of a machine is accepted; empty if one is."""
        if len(self._streams) >= _MOST_STREAMS:
            return f"{len(self._streams)} streams are open already, the limit"
        of_host = sum(stream.session.host == host for stream in self._streams)
        if of_host >= max(1, _MOST_STREAMS // 2):
            return f"{of_host} streams of {host} are open already, half of the limit"
        return ""

    async def _read(self, requests: AsyncIterator[bytes], stream: _Stream) -> None:
        try:
            async for data in requests:
                if self._draining:
                    return
                self._statistics.messages += 1
                # A recorder that reads no acknowledgement holds up the check beside them.
                self._check_token(stream.session)
                try:
                    message = pb.FromRecorder.FromString(data)
                except DecodeError:
                    text = "this is not a foreshock.v1.FromRecorder message"
                    raise RefusedError(text, reason="malformed") from None
                self._intake.apply(message, stream.session)
        finally:
            stream.wake.set()

    def _check_token(self, session: Session) -> None:
        """Raise `RefusedError` if the token of a stream was removed or has expired."""
        if not (self._tokens is None or session.token is None or self._tokens.is_valid(session.token)):
            raise RefusedError("the token of this stream is no longer valid", reason="token")

    def _ack(self, stream: _Stream) -> pb.Ack:
        seconds = self._flow.seconds_for(self._intake.held_seconds(stream.session))
        positions = self._intake.positions(stream.session)
        stream.exited = all(position.closed for position in positions)
        return pb.Ack(
            epoch=self._epoch,
            positions=positions,
            flow=pb.FlowControl(flush_interval_seconds=seconds, max_batch_steps=_MAX_BATCH_STEPS),
            page_url=self._page_url(),
            schema_version=SCHEMA_VERSION,
        )

    def _wake(self, streams: Any) -> None:
        for stream in streams:
            stream.wake.set()


def make_server(telemetry: Telemetry) -> Any:
    """Return a grpc.aio server for it. gRPC passes bytes, so that a malformed message gets a clear status."""
    server = grpc.aio.server(options=_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(
        telemetry.stream, request_deserializer=None, response_serializer=pb.Ack.SerializeToString
    )
    services = {"Stream": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("foreshock.v1.Telemetry", services),))
    return server
