"""Messages on their way to the receiver: one per run, sent again until the receiver has it or refuses it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from foreshock_collector.notify.message import body_of
from foreshock_collector.notify.run_alerts import Notification
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.notify.webhook import Answer, Webhook

logger = logging.getLogger(__name__)

_MOST_RUNS = 1000
"""Runs whose messages wait. With a handful of alerts each, that is a few megabytes."""
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 600.0
"""However long a receiver asks to wait: it must not silence alerts for a night."""

Run = tuple[str, str]
"""Experiment and name."""


class Outbox:
    """Holds what the receiver does not have yet: of each alert only the newest state.

    clock: Unix time. url: returns the address of the collector's page.
    """

    def __init__(
        self,
        webhook: Webhook,
        statistics: NotificationStatistics,
        clock: Callable[[], float],
        *,
        form: str,
        url: Callable[[], str],
    ) -> None:
        self._webhook = webhook
        self._statistics = statistics
        self._clock = clock
        self._form = form
        self._url = url
        self._waiting: dict[Run, dict[str, Notification]] = {}
        self._sending: Run | None = None
        """Run whose message the receiver may be taking now."""
        self._added = asyncio.Event()
        self._failures = 0
        """Attempts that failed since the last success."""
        self._asked_seconds = 0.0
        """How long the receiver has asked to wait at the last of them."""

    def add(self, notifications: Sequence[Notification]) -> None:
        """Add what is new about one run; an older state of the same alert that still waits is replaced."""
        run = (notifications[0].labels["experiment"], notifications[0].labels["run"])
        if run not in self._waiting and len(self._waiting) >= _MOST_RUNS:
            oldest = next(each for each in self._waiting if each != self._sending)
            del self._waiting[oldest]
            self._count("failed", oldest, "too many messages wait")
        self._waiting.setdefault(run, {}).update((each.labels["alertname"], each) for each in notifications)
        self._statistics.pending = len(self._waiting)
        self._added.set()

    async def send_forever(self) -> None:
        """Send whatever is added. A failed attempt delays the next one: all go to the same receiver."""
        while True:
            await self._added.wait()
            while self._waiting:
                if not await self._attempt(next(iter(self._waiting))):
                    await asyncio.sleep(pause(self._failures, self._asked_seconds))
            self._added.clear()

    async def send_once(self) -> None:
        """Make one attempt for each waiting message, and stop at the first that fails."""
        for run in list(self._waiting):
            if not await self._attempt(run):
                break

    async def _attempt(self, run: Run) -> bool:
        """Send the message about a run. Return whether it need not be sent again."""
        # A copy: `add` may replace some of it while the receiver is being waited for.
        sent = dict(self._waiting[run])
        self._sending = run
        try:
            body = body_of(list(sent.values()), form=self._form, url=self._url())
            answer = await self._webhook.post(body, self._clock())
        except Exception as error:
            # An error in one message must not end all others.
            logger.exception("notification about run %(run)s failed", {"run": run[1]})
            self._remove(run, sent)
            self._count("failed", run, type(error).__name__)
            return True
        finally:
            self._sending = None
        if answer.final:
            self._failures = 0
            self._remove(run, sent)
            self._count("sent" if answer.accepted else "failed", run, str(answer))
        else:
            self._failures += 1
            self._asked_seconds = answer.retry_seconds
            self._delay(run, answer)
        return answer.final

    def _remove(self, run: Run, sent: dict[str, Notification]) -> None:
        """Keep only what was added during the attempt."""
        newer = {name: each for name, each in self._waiting.pop(run, {}).items() if sent.get(name) is not each}
        if newer:
            self._waiting[run] = newer
        self._statistics.pending = len(self._waiting)

    def _delay(self, run: Run, answer: Answer) -> None:
        """Move a message to the end: it may be the only one that the receiver cannot take."""
        if run in self._waiting:
            self._waiting[run] = self._waiting.pop(run)
        if self._failures == 1:
            facts = {"run": run[1], "host": self._webhook.host, "reason": str(answer)}
            logger.warning("notification about run %(run)s not accepted by %(host)s: %(reason)s; trying again", facts)

    def _count(self, result: str, run: Run, reason: str) -> None:
        self._statistics.results[result] += 1
        facts = {"run": run[1], "host": self._webhook.host, "reason": reason}
        if result == "sent":
            logger.info("notification about run %(run)s sent to %(host)s", facts)
        else:
            logger.error("notification about run %(run)s to %(host)s dropped: %(reason)s", facts)


def pause(failures: int, asked: float) -> float:
    """Return the seconds before the next attempt: full jitter, so that collectors do not try in step.

    asked: how long the receiver has asked to wait. The pause comes on top.
    """
    # Of a receiver that is away for weeks, 2.0 ** failures would overflow.
    most = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 10))
    return min(asked, _LONGEST_ASKED_SECONDS) + random.uniform(0.0, most)  # noqa: S311 - no secret
