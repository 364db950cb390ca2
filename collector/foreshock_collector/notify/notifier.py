"""The collector's own notifications: evaluates the alerts of all runs, and sends what is new to one webhook."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.notify.outbox import Outbox, Run
from foreshock_collector.notify.run_alerts import RunAlerts
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.notify.webhook import webhook

logger = logging.getLogger(__name__)

_EVALUATION_SECONDS = 5.0
"""As often as the Prometheus example evaluates its rules."""
_LAST_SECONDS = 2.0
"""How long a collector that stops waits for the receiver."""


class Notifier:
    """Evaluates the alerts. facts: returns the series of each run. clock: Unix time; monotonic: seconds."""

    def __init__(
        self,
        facts: Callable[[], Iterator[Facts]],
        outbox: Outbox,
        clock: Callable[[], float],
        *,
        url: Callable[[], str],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._facts = facts
        self._outbox = outbox
        self._clock = clock
        self._url = url
        self._monotonic = monotonic
        self._alerts: dict[Run, RunAlerts] = {}

    async def evaluate(self) -> None:
        """Evaluate all runs once, and hand over what is new. Gives way to the event loop after each run."""
        found = set()
        for facts in self._facts():
            run = (facts.experiment, facts.run)
            found.add(run)
            self._update(run, facts)
            await asyncio.sleep(0)
        for run in self._alerts.keys() - found:
            self._update(run, None)

    def _update(self, run: Run, facts: Facts | None) -> None:
        try:
            self._evaluate(run, facts)
        except Exception:
            logger.exception("alerts on run %(run)s could not be evaluated", {"run": run[1]})

    def _evaluate(self, run: Run, facts: Facts | None) -> None:
        alerts = self._alerts.setdefault(run, RunAlerts(Addresses(collector=self._url())))
        if new := alerts.update(facts, self._clock(), self._monotonic()):
            self._outbox.add(new)
        if alerts.quiet:
            del self._alerts[run]

    async def evaluate_forever(self) -> None:
        """Evaluate every few seconds. Start it once `url` is known."""
        while True:
            await self.evaluate()
            await asyncio.sleep(_EVALUATION_SECONDS)


@asynccontextmanager
async def notifying(
    facts: Callable[[], Iterator[Facts]],
    statistics: NotificationStatistics,
    clock: Callable[[], float],
    *,
    target: str,
    secret: bytes | None,
    form: str,
    url: Callable[[], str],
) -> AsyncIterator[Notifier]:
    """Send what the notifier finds while the block lasts, and at its end what is new by then, unless an error ends it.

    target: the webhook's address.
    """
    async with webhook(target, secret) as client:
        outbox = Outbox(client, statistics, clock, form=form, url=url)
        notifier = Notifier(facts, outbox, clock, url=url)
        sending = asyncio.create_task(outbox.send_forever())
        try:
            yield notifier
        finally:
            sending.cancel()
            await asyncio.wait((sending,))
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SECONDS):
                await notifier.evaluate()
                await outbox.send_once()
