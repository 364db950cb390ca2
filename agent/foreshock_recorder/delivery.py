"""Delivers what the rings of one launch hold to one collector."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from foreshock_protos import BLOCKS_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.folder import release
from foreshock_recorder.layout import FACTS
from foreshock_recorder.node import Node
from foreshock_recorder.ranks import Rank
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, run_stream

logger = logging.getLogger("foreshock_recorder")

POLL_SECONDS = 0.05
STOP_SECONDS = 2.0
"""From SIGTERM to the end. Ranks that were asked to stop as well write their exit within it."""
_RETRY_CAP_SECONDS = 30.0
_MOST_ASKED_SECONDS = 60.0
"""A collector that asks to wait longer is tried sooner anyway."""
_TRIES_WHILE_LINGERING = 4
"""The least number of streams tried after the last rank has exited: a collector that is back by then gets the rest."""


class Delivery:
    """Sends all that the rings of a folder hold to a collector, and removes what it has stored. Needs a running loop.

    held: the folder's lock. collector: host:port. linger: seconds to keep trying without progress after the last
    rank has exited. empty: seconds to look for another rank after everything is stored. awaits_idle: stay for ranks
    that may step again, since they cannot start another recorder.
    """

    def __init__(
        self, folder: Path, held: int, *, collector: str, linger: float, empty: float, awaits_idle: bool = False
    ) -> None:
        self.folder = folder
        self.collector = collector
        self.acknowledged = 0
        """Records that the collector has acknowledged to this process."""
        self.page = ""
        """Address of the run's page."""
        self._problem = ""
        self._held = held
        self._linger, self._empty, self._awaits_idle = linger, empty, awaits_idle
        self._ranks: dict[Path, Rank] = {}
        self._unreadable: dict[Path, tuple[int, int, bytes]] = {}
        """Rings that are damaged or of another version, and the `_version` at which they were found so."""
        self._interval = 1.0
        self._limit = 512
        self._answered = self._stopping = False
        self._takes_blocks = False
        """Whether the collector of this stream does: not before it has answered."""
        self._all_exited = asyncio.Event()
        self._progressed = time.monotonic()
        self._streaming = asyncio.create_task(self._stream_forever())

    @property
    def runs(self) -> set[str]:
        """Names that its ranks asked for."""
        return {rank.run for rank in self._ranks.values()}

    @property
    def unacknowledged(self) -> int:
        """Records that the collector does not have."""
        return sum(rank.unacknowledged for rank in self._ranks.values())

    @property
    def problem(self) -> str:
        """Why some records do not reach the collector; empty while all do."""
        return self._problem or next((rank.refusal for rank in self._ranks.values() if rank.refusal), "")

    @property
    def empty(self) -> bool:
        """True if the folder has no ring, or none any more."""
        return not self._ranks

    def stop(self) -> None:
        """Hurry: this process is about to leave."""
        self._stopping = True

    def poll(self, now: float) -> bool:
        """Poll the ranks. Return whether the delivery is over: all stored, or no progress for too long.

        Raises what went wrong in the stream.
        """
        if self._streaming.done():
            self._streaming.result()
        self._find_rings()
        for path, rank in list(self._ranks.items()):
            try:
                rank.poll(now, all_asked=self._stopping)
            except Exception as error:
                self._ignore(path, error)
                continue
            if rank.done:
                self._remove_ring(path)
        if all(rank.exited and not (rank.idle and self._awaits_idle) for rank in self._ranks.values()):
            self._all_exited.set()
        else:
            self._all_exited.clear()
            self._progressed = now
        return now - self._progressed >= (self._linger if self._ranks else self._empty)

    async def close(self) -> None:
        """Release the folder. What is not stored stays in it, for a later recorder."""
        self._streaming.cancel()
        await asyncio.gather(self._streaming, return_exceptions=True)
        for rank in self._ranks.values():
            rank.close()
        release(self.folder, self._held)

    def _find_rings(self) -> None:
        for path in sorted(self.folder.glob("*.ring")):
            if path in self._ranks:
                continue
            # Opened only then: a process that closes a file gives up its own locks on it.
            if path in self._unreadable and self._unreadable[path] == _version(path):
                continue
            try:
                rank = self._ranks[path] = Rank(path)
                rank.watch_process()
                rank.report_problem(self._problem)
            except Exception as error:
                # Whatever a file holds, the other ranks are served.
                self._ignore(path, error)

    def _ignore(self, path: Path, error: Exception) -> None:
        """Leave a ring alone that cannot be read, until its file changes; the others are served."""
        self._unreadable[path] = _version(path)
        rank = self._ranks.pop(path, None)
        if rank is not None:
            rank.close()
        logger.warning("ignored: %s", error)

    def _remove_ring(self, path: Path) -> None:
        rank = self._ranks.pop(path)
        rank.close()
        rank.stack_path.unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    # -- the collector -------------------------------------------------------------------------------------------

    async def _stream_forever(self) -> None:
        failures = 0
        while True:
            while not self._ranks:
                await asyncio.sleep(POLL_SECONDS)
            for rank in self._ranks.values():
                rank.restart_stream()
            self._answered = refused = self._takes_blocks = False
            asked_seconds = 0.0
            why = "the collector has ended the stream"
            try:
                await run_stream(self.collector, self._send_messages, self._on_ack)
            except UnreachableError as error:
                why, asked_seconds = str(error), error.retry_seconds
            except RefusedError as error:
                why, refused = f"refused: {error}", True
            if self._answered and not refused:
                logger.info("%s: %s", self.collector, why)
                failures = 0
            else:
                self._report_problem(f"{self.collector}: {why}")
            await self._pause(failures, refused=refused, asked_seconds=asked_seconds)
            failures += 1

    async def _pause(self, failures: int, *, refused: bool, asked_seconds: float) -> None:
        # Full jitter: gRPC's own leaves two thirds of a fleet in the same second.
        share = random.random()  # noqa: S311 - no secret
        with suppress(TimeoutError):
            # A fast run overwrites its ring within seconds: half of it is left for the way back.
            fastest = min((rank.fill_seconds() for rank in self._ranks.values() if not rank.exited), default=math.inf)
            pause = pause_seconds(failures, share, refused=refused, fill_seconds=fastest, asked_seconds=asked_seconds)
            async with asyncio.timeout(pause):
                await self._all_exited.wait()
                # A pause as long as the linger would end after the recorder.
                await asyncio.sleep(share * self._linger / _TRIES_WHILE_LINGERING)

    async def _send_messages(self, send: Send) -> None:
        node = Node(self._ignore)
        while True:
            interval = min(self._interval, STOP_SECONDS / 10) if self._stopping else self._interval
            compose = node.next_messages if self._takes_blocks else self._messages_by_rank
            for message in compose(dict(self._ranks), time.monotonic(), interval=interval, limit=self._limit):
                await send(message)
            await asyncio.sleep(POLL_SECONDS)

    def _messages_by_rank(
        self, ranks: Mapping[Path, Rank], now: float, *, interval: float, limit: int
    ) -> Iterator[pb.FromRecorder]:
        for path, rank in ranks.items():
            if path not in self._ranks:
                continue  # ignored or removed while another rank's messages were sent
            try:
                yield from rank.next_messages(now, interval=interval, limit=limit)
            except Exception as error:
                self._ignore(path, error)

    def _on_ack(self, ack: pb.Ack) -> None:
        if not self._answered:
            self._answered = True
            logger.info("%s answers; page: %s", self.collector, ack.page_url or "none")
            self._report_problem("")
        self._takes_blocks = ack.schema_version >= BLOCKS_VERSION
        if ack.flow.flush_interval_seconds > 0:
            self._interval = min(ack.flow.flush_interval_seconds, 60.0)
        if ack.flow.max_batch_steps > 0:
            self._limit = ack.flow.max_batch_steps
        positions = {position.instance: position for position in ack.positions}
        for rank in self._ranks.values():
            position = positions.get(rank.instance)
            if position is None or rank.delivered:
                continue
            if position.refused:
                self._refuse(rank, position.refused)
                continue
            if rank.refusal:
                logger.info("rank %d: %s no longer refuses it", rank.number, self.collector)
                rank.report_problem("")
            acknowledged = rank.acknowledge(position)
            self.acknowledged += acknowledged
            if acknowledged or rank.delivered:
                self._progressed = time.monotonic()
            if ack.page_url and position.run:
                self.page = f"{ack.page_url}/run/{quote(position.run, safe='')}"
                rank.report_page(self.page)

    def _refuse(self, rank: Rank, why: str) -> None:
        """Stop sending this rank alone, until the collector takes its hello again."""
        text = f"{self.collector}: refused: {why}"
        if text != rank.refusal:
            logger.warning("rank %d: %s", rank.number, text)
        rank.refuse(text, time.monotonic(), random.random())  # noqa: S311 - no secret

    def _report_problem(self, text: str) -> None:
        if text and text != self._problem:
            logger.warning("%s", text)
        self._problem = text
        for rank in self._ranks.values():
            rank.report_problem(text)


def _version(path: Path) -> tuple[int, int, bytes]:
    """Return inode and size of a file and what its header begins with; zeros if it cannot be opened."""
    with suppress(OSError):
        # For writing too, as a ring is opened: a pipe of that name would wait for a writer.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            return found.st_ino, found.st_size, os.pread(descriptor, FACTS.size, 0)
        finally:
            os.close(descriptor)
    return 0, 0, b""


def pause_seconds(
    failures: int, share: float, *, refused: bool, fill_seconds: float = math.inf, asked_seconds: float = 0.0
) -> float:
    """Return how long to wait before the next stream.

    failures: streams without an answer before this one; share: in [0, 1). fill_seconds: in which the fastest rank
    overwrites its whole ring. asked_seconds: after which the collector asked to try again; 0 or less: it did not.
    """
    if asked_seconds > 0:
        return min(asked_seconds, _MOST_ASKED_SECONDS) * (1.0 + share)
    if refused:
        return _RETRY_CAP_SECONDS * (0.5 + share)
    return share * min(_RETRY_CAP_SECONDS, 2.0 ** min(failures, 10), fill_seconds / 2)
