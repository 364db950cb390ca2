"""What the rings of one launch hold, on its way to one collector."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from pathlib import Path
from urllib.parse import quote

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.folder import release
from foreshock_recorder.ranks import Rank
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, converse

logger = logging.getLogger("foreshock_recorder")

POLL_SECONDS = 0.05
STOP_SECONDS = 2.0
"""From SIGTERM to the end. Ranks that were told to stop as well say goodbye within it."""
_RETRY_CAP_SECONDS = 30.0


class Delivery:
    """Tells a collector all that the rings of a folder hold, and removes what it has stored. Needs a running loop.

    held: the folder's lock. collector: host:port. linger: seconds to go on without a step forward after the last rank
    has gone. empty: seconds to look for another rank after all is stored.
    """

    def __init__(self, folder: Path, held: int, *, collector: str, linger: float, empty: float) -> None:
        self.folder = folder
        self.collector = collector
        self.stored = 0
        """Records that it has acknowledged to us."""
        self.page = ""
        """Address of the run's page."""
        self._trouble = ""
        self._held = held
        self._linger, self._empty = linger, empty
        self._ranks: dict[Path, Rank] = {}
        self._strangers: set[Path] = set()
        self._interval = 1.0
        self._limit = 512
        self._heard = self._stopping = False
        self._moved = time.monotonic()
        self._telling = asyncio.create_task(self._tell())

    @property
    def runs(self) -> set[str]:
        """Names that its ranks asked for."""
        return {rank.run for rank in self._ranks.values()}

    @property
    def unstored(self) -> int:
        """Records that the collector does not have."""
        return sum(rank.unstored for rank in self._ranks.values())

    @property
    def trouble(self) -> str:
        """Why something does not get there; empty while all does."""
        return self._trouble or next((rank.refused for rank in self._ranks.values() if rank.refused), "")

    @property
    def empty(self) -> bool:
        """There is no ring, or none any more."""
        return not self._ranks

    def stop(self) -> None:
        """Hurry: this process is about to leave."""
        self._stopping = True

    def over(self, now: float) -> bool:
        """Look at the ranks. All have gone, and all is stored, or nobody took the rest for too long.

        Raises what went wrong in telling.
        """
        if self._telling.done():
            self._telling.result()
        self._find()
        for path, rank in list(self._ranks.items()):
            rank.look(now, all_asked=self._stopping)
            if rank.closed:
                self._let_go(path)
        if any(not rank.gone for rank in self._ranks.values()):
            self._moved = now
        return now - self._moved >= (self._linger if self._ranks else self._empty)

    async def close(self) -> None:
        """Let go of the folder. What is not stored stays in it, for whoever comes next."""
        self._telling.cancel()
        await asyncio.gather(self._telling, return_exceptions=True)
        for rank in self._ranks.values():
            rank.close()
        release(self.folder, self._held)

    def _find(self) -> None:
        for path in sorted(self.folder.glob("*.ring")):
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
            rank.say_trouble(self._trouble)

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
                await asyncio.sleep(POLL_SECONDS)
            for rank in self._ranks.values():
                rank.rewind()
            self._heard = refused = False
            why = "the collector has ended the stream"
            try:
                await converse(self.collector, self._talk, self._hear)
            except UnreachableError as error:
                why = str(error)
            except RefusedError as error:
                why, refused = f"refused: {error}", True
            if self._heard and not refused:
                logger.info("%s: %s", self.collector, why)
                failures = 0
            else:
                self._say_trouble(f"{self.collector}: {why}")
            # Full jitter: gRPC's own leaves two thirds of a fleet in the same second.
            share = random.random()  # noqa: S311 - no secret
            await asyncio.sleep(pause_seconds(failures, share, refused=refused))
            failures += 1

    async def _talk(self, send: Send) -> None:
        while True:
            interval = min(self._interval, STOP_SECONDS / 10) if self._stopping else self._interval
            for rank in list(self._ranks.values()):
                for message in rank.messages(time.monotonic(), interval=interval, limit=self._limit):
                    await send(message)
            await asyncio.sleep(POLL_SECONDS)

    def _hear(self, ack: pb.Ack) -> None:
        if not self._heard:
            self._heard = True
            logger.info("%s answers; page: %s", self.collector, ack.page_url or "none")
            self._say_trouble("")
        if ack.flow.flush_interval_seconds > 0:
            self._interval = min(ack.flow.flush_interval_seconds, 60.0)
        if ack.flow.max_batch_steps > 0:
            self._limit = ack.flow.max_batch_steps
        positions = {position.instance: position for position in ack.positions}
        for rank in self._ranks.values():
            position = positions.get(rank.instance)
            if position is None or rank.closed:
                continue
            if position.refused:
                self._refuse(rank, position.refused)
                continue
            stored = rank.stored(position)
            self.stored += stored
            if stored or rank.closed:
                self._moved = time.monotonic()
            if ack.page_url and position.run:
                self.page = f"{ack.page_url}/run/{quote(position.run, safe='')}"
                rank.say_page(self.page)

    def _refuse(self, rank: Rank, why: str) -> None:
        """It alone is not taken in; the next stream asks again."""
        if not rank.refused:
            rank.refuse(f"{self.collector}: refused: {why}")
            logger.warning("rank %d: %s", rank.number, rank.refused)

    def _say_trouble(self, text: str) -> None:
        if text and text != self._trouble:
            logger.warning("%s", text)
        self._trouble = text
        for rank in self._ranks.values():
            rank.say_trouble(text)


def pause_seconds(failures: int, share: float, *, refused: bool) -> float:
    """How long to wait before the next stream. failures: without an answer before this one; share: in [0, 1)."""
    if refused:
        return _RETRY_CAP_SECONDS * (0.5 + share)
    return share * min(_RETRY_CAP_SECONDS, 2.0 ** min(failures, 10))
