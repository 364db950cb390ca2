"""The recorder: serves the ranks of a launch, adopts orphans of other launches, and leaves after the last rank."""

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
"""How long to wait for another rank after the last one has exited."""
_ADOPT_SECONDS = 10.0
"""Between two searches for orphans; the recorder's own ranks come first."""
_RETRY_SECONDS = 300.0
"""Before an orphan is tried again that no collector took."""
_MAX_ADOPTED = 4
"""Orphans delivered at the same time."""


class Recorder:
    """Serves `folder`, whose lock is `held`. As a side-car, with the name of a run, it serves the launches below it.

    collector: host:port. linger: seconds to keep trying after the last rank has exited.
    """

    def __init__(self, folder: Path, held: int, *, collector: str, linger: float, run: str = "") -> None:
        self._folder = folder
        self._collector = collector
        self._linger = linger
        self._runs = {run} if run else set[str]()
        self._side_car = self._waits = bool(run)
        self._base = folder.parent if run else folder.parent.parent
        self._own = [] if run else [self._delivery(folder, held, collector, empty=_EMPTY_SECONDS)]
        # Left by ranks that have exited: not what a side-car waits for.
        self._served = {found.folder for found in orphans(launches(self._base))} if run else set[Path]()
        self._adopted: list[Delivery] = []
        self._adopt_at = time.monotonic() + _ADOPT_SECONDS
        self._tried: dict[Path, float] = {}
        self._left = 0
        self._stop_at: float | None = None

    def stop(self) -> None:
        """Send what can be sent within two seconds, then leave. Rings stay for a later recorder."""
        if self._stop_at is None:
            logger.info("asked to stop")
            self._stop_at = time.monotonic() + STOP_SECONDS
            for delivery in (*self._own, *self._adopted):
                delivery.stop()

    async def run(self) -> int:
        """Run until every rank has exited and all is stored, or time is up. Return how many records are left."""
        try:
            while not await self._poll(time.monotonic()):
                await asyncio.sleep(POLL_SECONDS)
        finally:
            for delivery in (*self._own, *self._adopted):
                await delivery.close()
        return self._left

    async def _poll(self, now: float) -> bool:
        """Poll all deliveries. Return whether the recorder's work is done."""
        if self._side_car:
            self._find_launches()
        served = bool(self._own)
        for delivery in list(self._own):
            self._runs |= delivery.runs
            if delivery.poll(now):
                self._left += delivery.unacknowledged
                self._own.remove(delivery)
                await delivery.close()
        for delivery in list(self._adopted):
            if self._poll_adopted(delivery, now):
                self._adopted.remove(delivery)
                await delivery.close()
        if self._stop_at is not None:
            return now >= self._stop_at or all(delivery.empty for delivery in (*self._own, *self._adopted))
        if self._waits or self._own:
            if now >= self._adopt_at:
                self._adopt(now)
            return False
        if served and not self._left:
            # Once more before leaving: an orphan may wait long for another recorder.
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
        self._adopt_at = now + _ADOPT_SECONDS
        try:
            self._adopt_orphans(now)
        except Exception:
            # Whatever is wrong with orphans, the recorder's own ranks are served.
            logger.exception("cannot deliver orphans")

    def _adopt_orphans(self, now: float) -> None:
        mine = {delivery.folder for delivery in (*self._own, *self._adopted)}
        for found in orphans(launches(self._base) - mine):
            if len(self._adopted) >= _MAX_ADOPTED:
                return
            if self._tried.get(found.folder, now) > now:
                continue
            self._tried[found.folder] = now + _RETRY_SECONDS
            held = lock(found.folder, patience=0.0)
            if held is not None:
                # For the same run, the address may have been corrected since.
                address = self._collector if found.run in self._runs else address_of(found.collector)
                logger.info("delivering the records of run %s in %s to %s", found.run, found.folder, address)
                self._adopted.append(self._delivery(found.folder, held, address, empty=0.0))

    def _poll_adopted(self, delivery: Delivery, now: float) -> bool:
        try:
            over = delivery.poll(now)
        except Exception:
            # As above; its rings stay, and are tried again later.
            logger.exception("cannot deliver %s", delivery.folder)
            return True
        if over and delivery.unacknowledged:
            logger.info("%d records stay in %s (%s)", delivery.unacknowledged, delivery.folder, delivery.problem)
        return over

    def _delivery(self, folder: Path, held: int, collector: str, *, empty: float) -> Delivery:
        return Delivery(folder, held, collector=collector, linger=self._linger, empty=empty, awaits_idle=self._side_car)
