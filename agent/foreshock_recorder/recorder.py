"""The recorder's life: finds the ranks of a run on this node, tells a collector about them, leaves after the last."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from pathlib import Path

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.ranks import Rank
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, converse

logger = logging.getLogger("foreshock_recorder")

_POLL_SECONDS = 0.05
_EMPTY_SECONDS = 2.0
"""How long to look for another rank after the last one has gone."""
_STOP_SECONDS = 2.0
"""From SIGTERM to the end. Ranks that were told to stop as well say goodbye within it."""
_RETRY_CAP_SECONDS = 30.0


class Recorder:
    """All ranks of one run on one node.

    linger: seconds to go on trying after the last rank has gone. waits: look for the first rank without limit.
    """

    def __init__(self, folder: Path, *, collector: str, linger: float, waits: bool) -> None:
        self._folder = folder
        self._collector = collector
        self._linger = linger
        self._ranks: dict[Path, Rank] = {}
        self._strangers: set[Path] = set()
        self._interval = 1.0
        self._limit = 512
        self._heard = False
        self._trouble = ""
        self._last_alive = None if waits else time.monotonic()
        self._stop_at: float | None = None

    def stop(self) -> None:
        """Send what can be sent within two seconds, then leave. Rings stay for whoever comes next."""
        if self._stop_at is None:
            logger.info("told to stop")
            self._stop_at = time.monotonic() + _STOP_SECONDS

    async def run(self) -> int:
        """Until every rank has gone and all is stored, or time is up. How many records were given up."""
        telling = asyncio.create_task(self._tell())
        try:
            while not self._over(time.monotonic()):
                if telling.done():
                    telling.result()
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        if self._stop_at is not None:
            return 0
        lost = sum(rank.unstored for rank in self._ranks.values())
        for path in list(self._ranks):
            self._let_go(path)
        return lost

    def _over(self, now: float) -> bool:
        self._find()
        for path, rank in list(self._ranks.items()):
            rank.look(now, all_asked=self._stop_at is not None)
            if rank.closed:
                self._let_go(path)
        if any(not rank.gone for rank in self._ranks.values()):
            self._last_alive = now
        elif self._ranks:
            # Ranks that went before we came count from now on.
            self._last_alive = self._last_alive or now
        if self._stop_at is not None and (now >= self._stop_at or not self._ranks):
            return True
        patience = self._linger if self._ranks else _EMPTY_SECONDS
        return self._last_alive is not None and now - self._last_alive >= patience

    def _find(self) -> None:
        for path in sorted(self._folder.glob("*.ring")):
            if path in self._ranks or path in self._strangers:
                continue
            try:
                rank = Rank(path)
            except (OSError, ValueError) as error:
                self._strangers.add(path)
                logger.warning("left alone: %s", error)
                continue
            self._ranks[path] = rank
            rank.watch()
            rank.reader.trouble(self._trouble)

    def _let_go(self, path: Path) -> None:
        rank = self._ranks.pop(path)
        rank.close()
        rank.left_behind.unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    # -- the collector -------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        failures = 0
        while True:
            while not self._ranks:
                await asyncio.sleep(_POLL_SECONDS)
            for rank in self._ranks.values():
                rank.rewind()
            self._heard = refused = False
            why = "the collector has ended the stream"
            try:
                await converse(self._collector, self._talk, self._hear)
            except UnreachableError as error:
                why = str(error)
            except RefusedError as error:
                why, refused = f"refused: {error}", True
            if self._heard and not refused:
                logger.info("%s: %s", self._collector, why)
                failures = 0
            else:
                self._say_trouble(f"{self._collector}: {why}")
            # Full jitter: gRPC's own leaves two thirds of a fleet in the same second.
            share = random.random()  # noqa: S311 - no secret
            await asyncio.sleep(pause_seconds(failures, share, refused=refused))
            failures += 1

    async def _talk(self, send: Send) -> None:
        while True:
            interval = self._interval if self._stop_at is None else min(self._interval, _STOP_SECONDS / 10)
            for rank in list(self._ranks.values()):
                for message in rank.messages(time.monotonic(), interval=interval, limit=self._limit):
                    await send(message)
            await asyncio.sleep(_POLL_SECONDS)

    def _hear(self, ack: pb.Ack) -> None:
        if not self._heard:
            self._heard = True
            logger.info("%s answers; page: %s", self._collector, ack.page_url or "none")
            self._say_trouble("")
        if ack.flow.flush_interval_seconds > 0:
            self._interval = min(ack.flow.flush_interval_seconds, 60.0)
        if ack.flow.max_batch_steps > 0:
            self._limit = ack.flow.max_batch_steps
        positions = {position.instance: position for position in ack.positions}
        for rank in self._ranks.values():
            position = positions.get(rank.instance)
            if position is not None and not rank.closed:
                rank.stored(position)

    def _say_trouble(self, text: str) -> None:
        if text and text != self._trouble:
            logger.warning("%s", text)
        self._trouble = text
        for rank in self._ranks.values():
            rank.reader.trouble(text)


def pause_seconds(failures: int, share: float, *, refused: bool) -> float:
    """How long to wait before the next stream. failures: without an answer before this one; share: in [0, 1)."""
    if refused:
        return _RETRY_CAP_SECONDS * (0.5 + share)
    return share * min(_RETRY_CAP_SECONDS, 2.0 ** min(failures, 10))
