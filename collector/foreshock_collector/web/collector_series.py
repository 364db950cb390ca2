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
from foreshock_collector.web.samples import Sample, families_of

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

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of all of them."""
        counted = self._statistics
        yield Sample(c.BUILD_INFO, (self._version, platform.python_version()), 1)
        for stage, count in self._errors.counts.items():
            yield Sample(c.COLLECTOR_ERRORS, (stage,), count)
        yield Sample(c.COLLECTOR_STREAMS, (), counted.streams)
        yield Sample(c.COLLECTOR_MESSAGES, (), counted.messages)
        yield Sample(c.COLLECTOR_SKIPPED, (), counted.skipped)
        yield Sample(c.COLLECTOR_RECORDS, (), counted.records)
        for reason, count in counted.refused.items():
            yield Sample(c.COLLECTOR_REFUSED, (reason,), count)
        yield Sample(c.COLLECTOR_OTLP_FAILURES, (), counted.otlp_failures)
        yield Sample.from_histogram(c.COMMIT_DURATION, (), counted.commit_seconds)
        yield Sample(c.INGEST_LAG, (), counted.lag_seconds(self._clock()))
        yield Sample(c.FLUSH_INTERVAL, (), counted.flush_seconds)
        for result, count in self._notifications.results.items():
            yield Sample(c.NOTIFICATIONS, (result,), count)
        yield Sample(c.NOTIFICATIONS_PENDING, (), self._notifications.pending)
        yield Sample(c.DATABASE_SIZE, (), self._database_bytes())
