"""The series of /metrics as OpenTelemetry's metrics, sent to a receiver over OTLP/HTTP.

opentelemetry-sdk and its exporter are imported only if an endpoint is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from foreshock_collector.catalogue import CATALOGUE
from foreshock_collector.ingest.statistics import IngestStatistics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, Metric, MetricExporter, MetricsData

EXPORT_SECONDS = 15.0
"""Seconds between exports, as between the scrapes of deploy/prometheus/prometheus.yml."""
REQUEST_SECONDS = 10.0
"""Longest time for one export, its retries included: shorter than the period, so that exports do not queue."""
UNITS = {"": "", "seconds": "s", "bytes": "By", "ratio": "1"}
"""Units of the catalogue: how OpenTelemetry writes them (UCUM)."""
_UNITS = {series.name: UNITS[series.unit] for series in CATALOGUE}
_UNKNOWN_START = 0
"""Counters of runs are older than this process: OTLP's value for an unknown start."""
logger = logging.getLogger(__name__)


class OtlpExport:
    """Sends all series of a registry to a receiver, every `EXPORT_SECONDS`.

    clock: returns Unix time. attributes: those of the resource. Raises ImportError without the packages of the extra
    `otlp`. Headers, certificates and compression come from OpenTelemetry's own variables.
    """

    def __init__(
        self,
        endpoint: str,
        registry: CollectorRegistry,
        statistics: IngestStatistics,
        clock: Callable[[], float],
        attributes: dict[str, str],
    ) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        self._exporter: MetricExporter = OTLPMetricExporter(endpoint=endpoint, timeout=REQUEST_SECONDS)
        self._endpoint = endpoint
        self._registry = registry
        self._statistics = statistics
        self._clock = clock
        self._attributes = attributes
        self._failing = False

    async def run(self) -> None:
        """Export until cancelled. Whatever fails is counted; the first failure of several in a row is logged."""
        while True:
            await self.export()
            await asyncio.sleep(EXPORT_SECONDS)

    async def export(self) -> None:
        """Send the present values, off the event loop."""
        reason = "see the line of OpenTelemetry's exporter"
        try:
            # State is read on the event loop, which alone changes it.
            families = list(self._registry.collect())
            sent = await _in_thread(lambda: self._send(families, self._clock()))
        except Exception as error:
            sent, reason = False, f"{type(error).__name__}: {error}"
        if not sent:
            self._statistics.otlp_failures += 1
        facts = {"endpoint": self._endpoint, "reason": reason}
        if not sent and not self._failing:
            logger.warning("cannot export to --otlp-endpoint %(endpoint)s: %(reason)s; it is tried again", facts)
        if sent and self._failing:
            logger.info("exports to --otlp-endpoint %(endpoint)s again", facts)
        self._failing = not sent
        # The exporter logs each attempt, four in each export: once is enough.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL if self._failing else logging.NOTSET)

    def _send(self, families: Iterable[Family], now: float) -> bool:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        data = metrics_data(families, now, self._attributes)
        return self._exporter.export(data) is MetricExportResult.SUCCESS


def metrics_data(families: Iterable[Family], now: float, attributes: dict[str, str]) -> MetricsData:
    """Return families of prometheus-client as OpenTelemetry's metrics of one resource. now: Unix time."""
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    metrics = [_metric(family, int(now * 1e9)) for family in families if family.samples]
    scope = ScopeMetrics(scope=InstrumentationScope("foreshock_collector"), metrics=metrics, schema_url="")
    # By itself, `create` prefers what it is given to OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
    resource = Resource.create(dict(attributes)).merge(OTELResourceDetector().detect())
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=[scope], schema_url="")])


def _metric(family: Family, now: int) -> Metric:
    """Return one family. now: Unix time in ns."""
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, Metric, NumberDataPoint, Sum

    name = f"{family.name}_total" if family.type == "counter" else family.name
    data: Gauge | Histogram | Sum
    if family.type == "histogram":
        data = Histogram(list(_histograms(family.samples, now)), AggregationTemporality.CUMULATIVE)
    else:
        points = [NumberDataPoint(each.labels, _UNKNOWN_START, now, each.value) for each in family.samples]
        counts = family.type == "counter"
        data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True) if counts else Gauge(points)
    return Metric(name=name, description=family.documentation, unit=_UNITS.get(name, ""), data=data)


def _histograms(samples: Sequence[Sample], now: int) -> Iterator[HistogramDataPoint]:
    """Return a point for each set of labels: Prometheus counts a bucket with all below it, OTLP each by itself."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for each in samples:
        labels = tuple((name, value) for name, value in each.labels.items() if name != "le")
        if each.name.endswith("_bucket"):
            buckets.setdefault(labels, []).append((float(each.labels["le"]), each.value))
        elif each.name.endswith("_sum"):
            sums[labels] = each.value
    for labels, cumulative in buckets.items():
        totals = [int(total) for _, total in cumulative]
        yield HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=_UNKNOWN_START,
            time_unix_nano=now,
            count=totals[-1],
            sum=sums[labels],
            bucket_counts=[total - below for total, below in zip(totals, [0, *totals], strict=False)],
            explicit_bounds=[bound for bound, _ in cumulative[:-1]],
            min=None,  # type: ignore[arg-type]  # optional in the protocol, and not known
            max=None,  # type: ignore[arg-type]
        )


async def _in_thread(function: Callable[[], bool]) -> bool:
    """Return what a function returns in a thread that no exit waits for, unlike those of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def run() -> None:
        try:
            sent, error = function(), None
        except Exception as raised:
            sent, error = False, raised
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(finish, sent, error)

    def finish(sent: bool, error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(sent)
        else:
            done.set_exception(error)

    threading.Thread(target=run, name="foreshock-otlp", daemon=True).start()
    return await done
