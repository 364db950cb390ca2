"""One value of a series of the catalogue, and the families that /metrics consists of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from foreshock_collector.catalogue import Kind, Series
from foreshock_collector.state.totals import Histogram

Labels = tuple[str, ...]
Buckets = tuple[tuple[str, float], ...]
"""Upper bound, and how many lie below."""


class Sample:
    """A value of one series, or the buckets of a histogram. Whatever is wrong with it raises when it is made."""

    def __init__(self, series: Series, labels: Labels, value: float, buckets: Buckets = ()) -> None:
        self.series = series
        self.labels = tuple(map(str, labels))
        self.value = float(value)
        self.buckets = buckets
        """Cumulative counts, of a histogram."""

    @classmethod
    def from_histogram(cls, series: Series, labels: Labels, histogram: Histogram) -> Sample:
        """Make the cumulative counts that Prometheus expects."""
        bounds = (*map(repr, histogram.bounds), "+Inf")
        counts = accumulate(map(float, histogram.counts))
        return cls(series, labels, histogram.total, tuple(zip(bounds, counts, strict=True)))

    def add_to(self, families: dict[str, Metric]) -> None:
        """Join its family, unless it is not finite: an alert on a NaN never fires, and a maximum hides behind one."""
        if not math.isfinite(self.value):
            return
        family = families[self.series.name]
        if isinstance(family, HistogramMetricFamily):
            family.add_metric(self.labels, self.buckets, self.value)
        else:
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric(self.labels, self.value)


def families_of(series: Iterable[Series], samples: Iterable[Sample]) -> Iterator[Metric]:
    """Return a family for each series, in order, with the samples that belong to it."""
    families = {each.name: _family(each) for each in series}
    for sample in samples:
        sample.add_to(families)
    yield from families.values()


def _family(series: Series) -> Metric:
    if series.kind is Kind.COUNTER:
        return CounterMetricFamily(series.name, series.help, labels=series.labels)
    if series.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(series.name, series.help, labels=series.labels)
    return GaugeMetricFamily(series.name, series.help, labels=series.labels)
