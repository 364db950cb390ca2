"""The collector itself as Prometheus series, beside those that prometheus-client exports of its process."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.catalogue import Series
from foreshock_collector.ingest.statistics import IngestStatistics
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.state.errors import Errors
from foreshock_collector.web.samples import Samples, families_of

_SERIES = tuple(s for s in c.CATALOGUE if not set(c.RUN) <= set(s.labels) and s not in c.PROCESS)


class CollectorSeries(Collector):
    """Reads what the collector counts about itself, at each scrape.

    errors: those that no single run has caused. database_bytes: returns the size of the database. clock: Unix time.
    """

    def __init__(
        self,
        statistics: IngestStatistics,
        errors: Errors,
        database_bytes: Callable[[], int],
        clock: Callable[[], float],
        *,
        notifications: NotificationStatistics,
        version: str,
    ) -> None:
        self._statistics = statistics
        self._errors = errors
        self._database_bytes = database_bytes
        self._clock = clock
        self._notifications = notifications
        self._version = version

    def describe(self) -> list[Metric]:
        """Return nothing: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return every family about the collector, in the order of the catalogue."""
        yield from families_of(_SERIES, self.samples())

    @property
    def series(self) -> Sequence[Series]:
        """Series of the collector itself, in the order of the catalogue."""
        return _SERIES

    def samples(self) -> Iterator[Samples]:
        """Yield the samples of all of them."""
        counted = self._statistics
        yield Samples(c.BUILD_INFO, (), {(self._version, platform.python_version()): 1})
        yield Samples(c.COLLECTOR_ERRORS, (), {(stage,): count for stage, count in self._errors.counts.items()})
        yield Samples(c.COLLECTOR_STREAMS, (), {(): counted.streams})
        yield Samples(c.COLLECTOR_MESSAGES, (), {(): counted.messages})
        yield Samples(c.COLLECTOR_SKIPPED, (), {(): counted.skipped})
        yield Samples(c.COLLECTOR_RECORDS, (), {(): counted.records})
        yield Samples(c.COLLECTOR_REFUSED, (), {(reason,): count for reason, count in counted.refused.items()})
        yield Samples(c.COLLECTOR_OTLP_FAILURES, (), {(): counted.otlp_failures})
        yield Samples.from_histogram(c.COMMIT_DURATION, (), counted.commit_seconds)
        yield Samples(c.INGEST_LAG, (), {(): counted.lag_seconds(self._clock())})
        yield Samples(c.FLUSH_INTERVAL, (), {(): counted.flush_seconds})
        results = self._notifications.results.items()
        yield Samples(c.NOTIFICATIONS, (), {(result,): count for result, count in results})
        yield Samples(c.NOTIFICATIONS_PENDING, (), {(): self._notifications.pending})
        yield Samples(c.DATABASE_SIZE, (), {(): self._database_bytes()})
