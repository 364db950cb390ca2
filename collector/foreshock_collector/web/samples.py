"""Values of the series of the catalogue, and the families that /metrics consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, compress
from math import isfinite
from typing import Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from foreshock_collector.catalogue import Kind, Series
from foreshock_collector.state.totals import Histogram

Labels = tuple[str, ...]


class Samples:
    """Values of one series that one run has, or the collector itself. A value that is no number raises here.

    owner: labels that all have. values: by further labels. Those that are not finite are left out: an alert on a NaN
    never fires, and a maximum hides behind one.
    """

    __slots__ = ("further", "owner", "series", "values")

    def __init__(self, series: Series, owner: Labels, values: Mapping[Labels, float]) -> None:
        self.series = series
        self.owner = owner
        self.further = tuple(values)
        """Further labels of each value; of a histogram, the upper bound of each bucket."""
        # Adding 0 makes a negative zero positive.
        self.values = [float(value) + 0.0 for value in values.values()]
        """Of a histogram, the count of each bucket and all below, and then the sum."""
        if not all(map(isfinite, self.values)):
            finite = [isfinite(value) for value in self.values]
            self.further = tuple(compress(self.further, finite))
            self.values = list(compress(self.values, finite))

    @classmethod
    def from_histogram(cls, series: Series, owner: Labels, histogram: Histogram) -> Self:
        """Make the cumulative counts that Prometheus expects."""
        samples = cls(series, owner, {})
        if isfinite(histogram.total):
            samples.further = _bounds(tuple(histogram.bounds))
            samples.values = [*accumulate(map(float, histogram.counts)), float(histogram.total)]
        return samples

    def add_to(self, family: Metric) -> None:
        """Join the family of this series."""
        if isinstance(family, HistogramMetricFamily):
            if self.values:
                *counts, total = self.values
                bounds = [bound for (bound,) in self.further]
                family.add_metric(self.owner, list(zip(bounds, counts, strict=True)), total)
            return
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        for labels, value in zip(self.further, self.values, strict=True):
            family.add_metric((*self.owner, *labels), value)


@lru_cache
def _bounds(bounds: tuple[float, ...]) -> tuple[Labels, ...]:
    return tuple((bound,) for bound in (*map(repr, bounds), "+Inf"))


def families_of(series: Iterable[Series], samples: Iterable[Samples]) -> Iterator[Metric]:
    """Return a family for each series, in order, with the samples that belong to it."""
    families = {each.name: _family(each) for each in series}
    for each in samples:
        each.add_to(families[each.series.name])
    yield from families.values()


def _family(series: Series) -> Metric:
    if series.kind is Kind.COUNTER:
        return CounterMetricFamily(series.name, series.help, labels=series.labels)
    if series.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(series.name, series.help, labels=series.labels)
    return GaugeMetricFamily(series.name, series.help, labels=series.labels)
