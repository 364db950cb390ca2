"""Current state as Prometheus series: a collector for prometheus-client, in a registry that its owner injects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.runs import Run, Runs
from foreshock_collector.totals import Histogram

Labels = tuple[str, ...]
_Family = TypeVar("_Family", bound=Metric)
_LEVELS = {
    "global_norm": c.GLOBAL_GRADIENT_NORM,
    "gradient_absolute_maximum": c.GRADIENT_ABSOLUTE_MAXIMUM,
    "clip_coefficient": c.CLIP_COEFFICIENT,
    "parameter_norm": c.PARAMETER_NORM,
    "update_ratio": c.UPDATE_RATIO,
    "loss": c.LOSS,
    "learning_rate": c.LEARNING_RATE,
    "loss_scale": c.LOSS_SCALE,
    "step": c.STEP,
}
_STEPS = {"spike": c.LAST_SPIKE_STEP, "build_up": c.LAST_BUILD_UP_STEP, "loss_spike": c.LAST_LOSS_SPIKE_STEP}
_COUNTERS = {
    "steps": c.STEPS,
    "clipped": c.CLIPPED_STEPS,
    "skipped": c.SKIPPED_STEPS,
    "shadow_clipped": c.SHADOW_CLIPPED_STEPS,
    "shadow_skipped": c.SHADOW_SKIPPED_STEPS,
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


class RunSeries(Collector):
    """Reads the runs at each scrape. `clock` gives Unix time.

    ended_seconds: how long the series of an ended run stay; when they go, Prometheus marks them stale and its alerts
    resolve. silent: seconds without a word that end a run.
    """

    def __init__(self, runs: Runs, clock: Callable[[], float], *, ended_seconds: float, silent: float) -> None:
        self._runs = runs
        self._clock = clock
        self._started = clock()
        self._ended_seconds = ended_seconds
        self._silent = silent

    def describe(self) -> list[Metric]:
        """Nothing in advance: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family of the catalogue, in its order."""
        now = self._clock()
        families: dict[str, Metric] = {series.name: _family(series) for series in c.CATALOGUE}
        _gauge(families, c.COLLECTOR_START, (), self._started)
        for run in self._runs:
            if run.ended_for(now, self._silent) < self._ended_seconds:
                self._add(families, run, now)
        yield from families.values()

    def _add(self, families: dict[str, Metric], run: Run, now: float) -> None:
        labels, totals = (run.experiment, run.name), run.totals
        for name, series in _LEVELS.items():
            if name in totals.levels:
                _gauge(families, series, labels, totals.levels[name])
        for name, series in _TIMES.items():
            _gauge(families, series, labels, totals.last[name])
        for name, series in _STEPS.items():
            if name in totals.event_steps:
                _gauge(families, series, labels, float(totals.event_steps[name]))
        for name, series in _COUNTERS.items():
            _counter(families, series, labels, totals.counters[name])
        for key, count in totals.nonfinite.items():
            _counter(families, c.NONFINITE_STEPS, (*labels, *key.split()), count)
        for reason, count in totals.dropped.items():
            _counter(families, c.RECORDS_DROPPED, (*labels, reason), count)
        for verdict, count in totals.incidents.items():
            _counter(families, c.INCIDENTS, (*labels, verdict), count)
            _gauge(families, c.LAST_INCIDENT, (*labels, verdict), totals.last_incident[verdict])
        _histogram(families, c.GRADIENT_NORM, labels, totals.norms)
        _histogram(families, c.STEP_DURATION, labels, totals.durations)
        _gauge(families, c.STALL_AFTER, labels, totals.stall_after())
        _gauge(families, c.RUN_ACTIVE, labels, float(run.active(now, self._silent)))
        attempt = run.newest
        ranks = attempt.instances.values()
        _gauge(families, c.RANKS_EXPECTED, labels, float(attempt.world_size))
        _gauge(families, c.RANKS_REPORTING, labels, float(sum(instance.reporting for instance in ranks)))
        hello = attempt.hello
        facts = (str(attempt.number), hello.model.type, hello.optimizer.type, hello.clip)
        _gauge(families, c.RUN_INFO, (*labels, *facts), 1.0)
        for instance in ranks:
            # One that has left has not fallen silent.
            if not instance.closed:
                _gauge(families, c.LAST_REPORT, (*labels, str(instance.rank)), instance.last_report)
            if instance.local_norm is not None:
                _gauge(families, c.LOCAL_GRADIENT_NORM, (*labels, str(instance.rank)), instance.local_norm)
        _gauge(families, c.RANK_AGREEMENT, labels, attempt.noise.agreement)
        if (scale := attempt.noise.value) is not None:
            _gauge(families, c.NOISE_SCALE, labels, scale)
        for layer, norm in attempt.largest_layers():
            _gauge(families, c.LAYER_GRADIENT_NORM, (*labels, layer), norm)
        if (incident := run.incidents.newest) is not None:
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
    # An alert on a NaN never fires, and one hides every other value in a maximum.
    if math.isfinite(value):
        _of(families, series, GaugeMetricFamily).add_metric(labels, value)


def _counter(families: dict[str, Metric], series: c.Series, labels: Labels, value: float) -> None:
    _of(families, series, CounterMetricFamily).add_metric(labels, value)


def _histogram(families: dict[str, Metric], series: c.Series, labels: Labels, histogram: Histogram) -> None:
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == math.inf else repr(bound), float(total)))
    _of(families, series, HistogramMetricFamily).add_metric(labels, buckets, histogram.total)


def _of(families: dict[str, Metric], series: c.Series, kind: type[_Family]) -> _Family:
    family = families[series.name]
    assert isinstance(family, kind)
    return family
