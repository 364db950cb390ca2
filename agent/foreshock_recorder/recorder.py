"""The recorder's life: serves the ranks of a launch, hands in what others have left, leaves after the last."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from foreshock_recorder.address import address_of
from foreshock_recorder.delivery import POLL_SECONDS, STOP_SECONDS, Delivery
from foreshock_recorder.folder import lock
from foreshock_recorder.orphans import launches, orphans

logger = logging.getLogger("foreshock_recorder")

_EMPTY_SECONDS = 2.0
"""How long to look for another rank after the last one has gone."""
_LOOK_SECONDS = 10.0
"""Between two looks for what others have left; the own ranks come first."""
_AGAIN_SECONDS = 300.0
"""Before one is tried again that nobody took."""
_MOST_ADOPTED = 4
"""Launches handed in at the same time."""


class Recorder:
    """Serves `folder`, whose lock is `held`. As a side-car, with the name of a run, the launches that come below it.

    collector: host:port. linger: seconds to go on trying after the last rank has gone.
    """

    def __init__(self, folder: Path, held: int, *, collector: str, linger: float, run: str = "") -> None:
        self._folder = folder
        self._collector = collector
        self._linger = linger
        self._runs = {run} if run else set[str]()
        self._side_car = self._waits = bool(run)
        self._base = folder.parent if run else folder.parent.parent
        self._own = [] if run else [self._delivery(folder, held, collector, empty=_EMPTY_SECONDS)]
        # Left behind by ranks that have gone: not what a side-car waits for.
        self._served = {found.folder for found in orphans(launches(self._base))} if run else set[Path]()
        self._adopted: list[Delivery] = []
        self._look_at = time.monotonic() + _LOOK_SECONDS
        self._tried: dict[Path, float] = {}
        self._left = 0
        self._stop_at: float | None = None

    def stop(self) -> None:
        """Send what can be sent within two seconds, then leave. Rings stay for whoever comes next."""
        if self._stop_at is None:
            logger.info("told to stop")
            self._stop_at = time.monotonic() + STOP_SECONDS
            for delivery in (*self._own, *self._adopted):
                delivery.stop()

    async def run(self) -> int:
        """Until every rank has gone and all is stored, or time is up. How many of its own ranks' records are left."""
        try:
            while not await self._over(time.monotonic()):
                await asyncio.sleep(POLL_SECONDS)
        finally:
            for delivery in (*self._own, *self._adopted):
                await delivery.close()
        return self._left

    async def _over(self, now: float) -> bool:
        if self._side_car:
            self._find_launches()
        served = bool(self._own)
        for delivery in list(self._own):
            self._runs |= delivery.runs
            if delivery.over(now):
                self._left += delivery.unstored
                self._own.remove(delivery)
                await delivery.close()
        for delivery in list(self._adopted):
            if self._adopted_is_over(delivery, now):
                self._adopted.remove(delivery)
                await delivery.close()
        if self._stop_at is not None:
            return now >= self._stop_at or all(delivery.empty for delivery in (*self._own, *self._adopted))
        if self._waits or self._own:
            if now >= self._look_at:
                self._adopt(now)
            return False
        if served and not self._left:
            # The last look: what is there now may wait long for another recorder.
            self._adopt(now)
        return not self._adopted

    def _find_launches(self) -> None:
        for folder in {path.parent for path in self._folder.glob("*/*.ring")} - self._served:
            held = lock(folder, patience=0.0)
            # Another recorder may have been there first.
            if held is not None:
                self._waits = False
                self._served.add(folder)
                self._own.append(self._delivery(folder, held, self._collector, empty=_EMPTY_SECONDS))

    def _adopt(self, now: float) -> None:
        self._look_at = now + _LOOK_SECONDS
        try:
            self._hand_in_others(now)
        except Exception:
            # Whatever is wrong with what others have left, the own ranks are served.
            logger.exception("what others have left cannot be handed in")

    def _hand_in_others(self, now: float) -> None:
        mine = {delivery.folder for delivery in (*self._own, *self._adopted)}
        for found in orphans(launches(self._base) - mine):
            if len(self._adopted) >= _MOST_ADOPTED:
                return
            if self._tried.get(found.folder, now) > now:
                continue
            self._tried[found.folder] = now + _AGAIN_SECONDS
            held = lock(found.folder, patience=0.0)
            if held is not None:
                # Of the same run, the address may have been put right since.
                address = self._collector if found.run in self._runs else address_of(found.collector)
                logger.info("hands in what run %s has left in %s, to %s", found.run, found.folder, address)
                self._adopted.append(self._delivery(found.folder, held, address, empty=0.0))

    def _adopted_is_over(self, delivery: Delivery, now: float) -> bool:
        try:
            over = delivery.over(now)
        except Exception:
            # As above: its rings stay, and are tried again later.
            logger.exception("%s cannot be handed in", delivery.folder)
            return True
        if over and delivery.unstored:
            logger.info("%d records stay in %s (%s)", delivery.unstored, delivery.folder, delivery.trouble)
        return over

    def _delivery(self, folder: Path, held: int, collector: str, *, empty: float) -> Delivery:
        return Delivery(folder, held, collector=collector, linger=self._linger, empty=empty)
