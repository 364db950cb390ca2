"""The recorder's loop: reads the rings, keeps one stream to the collector, resumes where it was acknowledged."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub
from foreshock_recorder.batches import RankRing

logger = logging.getLogger("foreshock_recorder")

_POLL_SECONDS = 0.05
_ACK_SECONDS = 10.0
"""Without a word from the collector for this long, with records outstanding, the stream is dead."""
_IN_FLIGHT = 4096
"""Unacknowledged records per rank at most; more stay in the ring."""
_EMPTY_SECONDS = 2.0
"""How long to look for another rank after the last one has gone."""
_RETRY_CAP_SECONDS = 30.0
_HOPELESS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class SilentCollectorError(Exception):
    """The collector took the connection and never answered."""


class Recorder:
    """Everything about one run on one node."""

    def __init__(self, folder: Path, *, collector: str, linger: float) -> None:
        self._folder = folder
        self._collector = collector
        self._linger = linger
        self._rings: dict[Path, RankRing] = {}
        self._bad: set[Path] = set()
        self._flush_seconds = 1.0
        self._batch_limit = 512
        self._last_ack = 0.0
        self._failures = 0
        self._last_ring = time.monotonic()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Leave soon: flush what can be flushed within two seconds."""
        self._linger = min(self._linger, 2.0)
        for ring in self._rings.values():
            ring.dead = True
        self._stopping.set()

    async def run(self) -> int:
        """Until every rank has gone and all is stored, or the linger time is over. How many records were lost."""
        watcher = asyncio.create_task(self._watch())
        streamer = asyncio.create_task(self._stream_forever())
        done, pending = await asyncio.wait((watcher, streamer), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        lost: int = sum(ring.reader.launched - ring.acknowledged for ring in self._rings.values())
        for path in list(self._rings):
            self._forget(path)
        return lost

    async def _watch(self) -> None:
        """Find rings, notice deaths, decide when to leave."""
        looked, gone_since = 0.0, None
        while True:
            now = time.monotonic()
            if now - looked >= 1.0:
                looked = now
                for ring in self._rings.values():
                    ring.reader.heartbeat(now)
                    ring.dead = ring.dead or not ring.reader.alive
            self._find()
            for path in [path for path, ring in self._rings.items() if ring.closed]:
                self._forget(path)
            if any(not ring.gone for ring in self._rings.values()):
                gone_since = None
                self._last_ring = now
            elif self._rings:
                gone_since = gone_since or now
                if now - gone_since > self._linger:
                    return
            elif now - self._last_ring > (0.1 if self._stopping.is_set() else _EMPTY_SECONDS):
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _find(self) -> None:
        for path in sorted(self._folder.glob("*.ring")):
            if path in self._rings or path in self._bad:
                continue
            try:
                self._rings[path] = RankRing(path)
            except (OSError, ValueError, KeyError) as error:
                self._bad.add(path)
                logger.warning("%s is left alone: %s", path.name, error)
            else:
                self._rings[path].reader.heartbeat(time.monotonic())

    def _forget(self, path: Path) -> None:
        self._rings.pop(path).reader.close()
        path.unlink(missing_ok=True)

    async def _stream_forever(self) -> None:
        while True:
            try:
                await self._stream()
            except (grpc.aio.AioRpcError, SilentCollectorError) as error:
                self._failures += 1
                code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                logger.warning("%s: %s", self._collector, why)
                for ring in self._rings.values():
                    ring.reader.trouble(f"{self._collector}: {why}")
            # Full jitter: gRPC's own leaves two thirds of a fleet in the same second.
            cap = _RETRY_CAP_SECONDS if code in _HOPELESS else min(_RETRY_CAP_SECONDS, 2.0**self._failures / 2)
            least = _RETRY_CAP_SECONDS / 2 if code in _HOPELESS else 0.1
            await asyncio.sleep(random.uniform(least, max(least, cap)))  # noqa: S311 - jitter, no secret

    async def _stream(self) -> None:
        """One stream, until it breaks."""
        for ring in self._rings.values():
            ring.greeted = False
            ring.rewind()
        options = [("grpc.enable_http_proxy", int(os.environ.get("FORESHOCK_HTTP_PROXY") == "1"))]
        async with grpc.aio.insecure_channel(self._collector, options=options) as channel:
            self._last_ack = time.monotonic()
            call = TelemetryStub(channel).Stream(self._messages())  # type: ignore[no-untyped-call]
            try:
                await self._read_acks(call)
            finally:
                call.cancel()

    async def _read_acks(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            try:
                ack = await asyncio.wait_for(call.read(), timeout=_ACK_SECONDS)
            except TimeoutError:
                if any(ring.sent > ring.acknowledged or not ring.closed for ring in self._rings.values()):
                    raise SilentCollectorError(f"no answer for {_ACK_SECONDS:g} s") from None
                continue
            if ack is grpc.aio.EOF:
                # Raises the status if there was an error; a collector that drains ends streams in peace.
                if await call.code() is not grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(
                        await call.code(), await call.initial_metadata(), await call.trailing_metadata(),
                        details=await call.details(),
                    )  # fmt: skip
                raise SilentCollectorError("the collector has ended the stream")
            self._take(ack)

    def _take(self, ack: pb.Ack) -> None:
        self._failures = 0
        if ack.flow.flush_interval_seconds > 0:
            self._flush_seconds = ack.flow.flush_interval_seconds
        if ack.flow.max_batch_steps > 0:
            self._batch_limit = ack.flow.max_batch_steps
        positions = {position.instance: position for position in ack.positions}
        for ring in self._rings.values():
            position = positions.get(ring.instance)
            if position is None:
                continue
            if not ring.greeted:
                # The collector is the authority: another database asks for all that the ring still holds.
                ring.rewind(position.sequence)
                ring.greeted = True
                ring.reader.trouble("")
            ring.acknowledged = position.sequence
            ring.closed = position.closed
            ring.reader.acknowledge(position.sequence, farewell=position.closed)

    async def _messages(self) -> AsyncIterator[pb.FromRecorder]:
        said: dict[str, set[int]] = {}
        while True:
            for ring in list(self._rings.values()):
                if ring.instance not in said:
                    said[ring.instance] = set()
                    yield ring.hello()
                if not ring.greeted:
                    continue
                for event in ring.events():
                    if event.event.kind not in said[ring.instance]:
                        said[ring.instance].add(event.event.kind)
                        yield event
                now = time.monotonic()
                due = now - ring.last_sent >= self._flush_seconds
                room = min(self._batch_limit, _IN_FLIGHT - (ring.sent - ring.acknowledged))
                records = ring.ready(now, max(room, 0))
                if (records and (due or ring.gone or ring.urgent(records))) or (due and not ring.gone):
                    message = ring.batch(records)
                    ring.note_sent(records)
                    yield message
                elif ring.gone and not records and room > 0 and not ring.said_goodbye:
                    ring.said_goodbye = True
                    yield ring.goodbye()
            await asyncio.sleep(_POLL_SECONDS)
