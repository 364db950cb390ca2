"""Current state as Prometheus series: a collector for prometheus-client, in a registry that its owner injects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.runs import Histogram, Run, Runs

Labels = tuple[str, ...]
_LEVELS = {
    "global_norm": c.GLOBAL_GRADIENT_NORM,
    "clip_coefficient": c.CLIP_COEFFICIENT,
    "loss": c.LOSS,
    "learning_rate": c.LEARNING_RATE,
    "loss_scale": c.LOSS_SCALE,
    "step": c.STEP,
}
_COUNTERS = {
    "steps": c.STEPS,
    "clipped": c.CLIPPED_STEPS,
    "skipped": c.SKIPPED_STEPS,
    "spike": c.GRADIENT_SPIKES,
    "build_up": c.GRADIENT_BUILD_UPS,
    "loss_spike": c.LOSS_SPIKES,
}
_TIMES = {
    "spike": c.LAST_SPIKE,
    "build_up": c.LAST_BUILD_UP,
    "loss_spike": c.LAST_LOSS_SPIKE,
    "nonfinite": c.LAST_NONFINITE,
    "step": c.LAST_STEP,
}


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long things stay."""

    ended_seconds: float = 900.0
    """Series of an ended run; Prometheus then marks them stale and its alerts resolve."""
    silent_seconds: float = 900.0
    """A run without a word for this long counts as ended."""


class RunSeries(Collector):
    """Reads the runs at each scrape. `clock` gives Unix time."""

    def __init__(self, runs: Runs, clock: Callable[[], float], started: float, retention: Retention) -> None:
        self._runs = runs
        self._clock = clock
        self._started = started
        self._retention = retention

    def describe(self) -> list[Metric]:
        """Nothing in advance: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family of the catalogue, in its order."""
        now = self._clock()
        kept = self._retention.ended_seconds
        runs = [
            run
            for run in self._runs
            if run.active(now, self._retention.silent_seconds) or now - run.last_heard() < kept
        ]
        families: dict[str, Metric] = {series.name: _family(series) for series in c.CATALOGUE}
        _gauge(families, c.COLLECTOR_START, (), self._started)
        for run in runs:
            self._add(families, run, now)
        yield from families.values()

    def _add(self, families: dict[str, Metric], run: Run, now: float) -> None:
        labels = (run.experiment, run.name)
        for name, series in _LEVELS.items():
            if name in run.levels:
                _gauge(families, series, labels, run.levels[name])
        for name, series in _TIMES.items():
            _gauge(families, series, labels, run.last[name])
        for name, series in _COUNTERS.items():
            _counter(families, series, labels, run.counters[name])
        for key, count in run.nonfinite.items():
            _counter(families, c.NONFINITE_STEPS, (*labels, *key.split()), count)
        for reason, count in run.dropped.items():
            _counter(families, c.RECORDS_DROPPED, (*labels, reason), count)
        for verdict, count in run.incident_counts.items():
            _counter(families, c.INCIDENTS, (*labels, verdict), count)
            _gauge(families, c.LAST_INCIDENT, (*labels, verdict), run.last_incident[verdict])
        _histogram(families, c.GRADIENT_NORM, labels, run.norms)
        _histogram(families, c.STEP_DURATION, labels, run.durations)
        _gauge(families, c.STALL_AFTER, labels, run.stall_after())
        _gauge(families, c.RUN_ACTIVE, labels, float(run.active(now, self._retention.silent_seconds)))
        newest = run.newest()
        if newest:
            hello = newest[0].hello
            _gauge(families, c.RANKS_EXPECTED, labels, float(hello.topology.world_size))
            facts = (str(newest[0].attempt), hello.model.type, hello.optimizer.type, hello.clip)
            _gauge(families, c.RUN_INFO, (*labels, *facts), 1.0)
        _gauge(families, c.RANKS_REPORTING, labels, float(sum(i.reporting for i in newest)))
        for instance in newest:
            if not instance.closed:
                _gauge(families, c.LAST_REPORT, (*labels, str(instance.rank)), instance.last_report)
            row = instance.last_row
            if row is not None and abs(row.local_norm) < float("inf") and row.complete:
                _gauge(families, c.LOCAL_GRADIENT_NORM, (*labels, str(instance.rank)), row.local_norm)
        if run.incidents:
            incident = run.incidents[-1]
            v = incident["verdict"]
            rank = "" if v["rank"] is None else str(v["rank"])
            facts_ = (str(incident["id"]), v["cause"], str(v["first_bad_step"]), str(v["lead_steps"]), rank, v["layer"])
            _gauge(families, c.INCIDENT_INFO, (*labels, *facts_), 1.0)


def _family(series: c.Series) -> Metric:
    if series.kind is c.Kind.COUNTER:
        return CounterMetricFamily(series.name, series.help, labels=series.labels)
    if series.kind is c.Kind.HISTOGRAM:
        return HistogramMetricFamily(series.name, series.help, labels=series.labels)
    return GaugeMetricFamily(series.name, series.help, labels=series.labels)


def _gauge(families: dict[str, Metric], series: c.Series, labels: Labels, value: float) -> None:
    family = families[series.name]
    assert isinstance(family, GaugeMetricFamily)
    family.add_metric(labels, value)


def _counter(families: dict[str, Metric], series: c.Series, labels: Labels, value: float) -> None:
    family = families[series.name]
    assert isinstance(family, CounterMetricFamily)
    family.add_metric(labels, value)


def _histogram(families: dict[str, Metric], series: c.Series, labels: Labels, histogram: Histogram) -> None:
    family = families[series.name]
    assert isinstance(family, HistogramMetricFamily)
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    family.add_metric(labels, buckets, histogram.total)
