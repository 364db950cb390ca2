"""The runs as Prometheus series: a collector for prometheus-client, in a registry that its owner injects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.catalogue import Series
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.web.samples import Sample, families_of

_SERIES = tuple(series for series in c.CATALOGUE if set(c.RUN) <= set(series.labels))
_STEPS = {"spike": c.LAST_SPIKE_STEP, "build_up": c.LAST_BUILD_UP_STEP, "loss_spike": c.LAST_LOSS_SPIKE_STEP}
_COUNTERS = {
    "steps": c.STEPS,
    "clipped": c.CLIPPED_STEPS,
    "abandoned": c.ABANDONED_STEPS,
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
    resolve. silent: seconds without a report that end a run.
    """

    def __init__(self, runs: Runs, clock: Callable[[], float], *, ended_seconds: float, silent: float) -> None:
        self._runs = runs
        self._clock = clock
        self._ended_seconds = ended_seconds
        self._silent = silent

    def describe(self) -> list[Metric]:
        """Return nothing: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return every family about runs, in the order of the catalogue."""
        yield from families_of(_SERIES, self.samples())

    @property
    def series(self) -> Sequence[Series]:
        """Series of runs, in the order of the catalogue."""
        return _SERIES

    def facts(self) -> Iterator[Facts]:
        """Return the samples of one run after the other, histograms aside: what alerts on runs are evaluated on."""
        now = self._clock()
        for run in self._runs:
            found = None
            with run.errors.caught("expose"):
                if run.ended_for(now, self._silent) < self._ended_seconds:
                    found = self._facts_of(run, now)
            if found is not None:
                yield found

    def _facts_of(self, run: Run, now: float) -> Facts:
        samples: dict[str, dict[tuple[str, ...], float]] = {}
        for sample in self._run_samples(run, now):
            if sample.series.kind is not c.Kind.HISTOGRAM and math.isfinite(sample.value):
                samples.setdefault(sample.series.name, {})[sample.labels[len(c.RUN) :]] = sample.value
        return Facts(experiment=run.experiment, run=run.name, now=now, samples=samples)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of one run after the other."""
        now = self._clock()
        for run in self._runs:
            # All samples of a run or none: a run that fails half-way affects no other.
            with run.errors.caught("expose"):
                if run.ended_for(now, self._silent) >= self._ended_seconds:
                    continue
                yield from list(self._run_samples(run, now))
            for stage, count in run.errors.counts.items():
                yield Sample(c.RUN_ERRORS, (run.experiment, run.name, stage), count)

    def _run_samples(self, run: Run, now: float) -> Iterator[Sample]:
        labels, totals = (run.experiment, run.name), run.totals
        for name, series in c.COLUMN_GAUGES.items():
            if name in totals.gauges:
                yield Sample(series, labels, totals.gauges[name])
        for name, series in _TIMES.items():
            yield Sample(series, labels, totals.last[name])
        for name, series in _STEPS.items():
            if name in totals.event_steps:
                yield Sample(series, labels, totals.event_steps[name])
        for name, series in _COUNTERS.items():
            yield Sample(series, labels, totals.counters[name])
        for key, count in totals.nonfinite.items():
            yield Sample(c.NONFINITE_STEPS, (*labels, *key.split()), count)
        for reason, count in totals.dropped.items():
            yield Sample(c.RECORDS_DROPPED, (*labels, reason), count)
        open_ = run.incidents.open_by_verdict()
        for verdict, count in totals.incidents.items():
            yield Sample(c.INCIDENTS, (*labels, verdict), count)
            yield Sample(c.OPEN_INCIDENTS, (*labels, verdict), open_[verdict])
            yield Sample(c.LAST_INCIDENT, (*labels, verdict), totals.last_incident[verdict])
        yield Sample.from_histogram(c.GRADIENT_NORM, labels, totals.norms)
        yield Sample.from_histogram(c.STEP_DURATION, labels, totals.durations)
        yield Sample(c.STALL_THRESHOLD, labels, run.stall_threshold())
        yield Sample(c.RUN_ACTIVE, labels, run.active(now, self._silent))
        attempt = run.newest
        ranks = attempt.instances.values()
        yield Sample(c.RANKS_EXPECTED, labels, attempt.world_size)
        yield Sample(c.RANKS_REPORTING, labels, sum(instance.reporting for instance in ranks))
        hello = attempt.hello
        facts = (str(attempt.number), hello.model.type, hello.optimizer.type, hello.clip)
        yield Sample(c.RUN_INFO, (*labels, *facts), 1)
        for instance in ranks:
            # One that has left has not fallen silent.
            if not instance.closed:
                yield Sample(c.LAST_REPORT, (*labels, str(instance.rank)), instance.last_report)
            if instance.local_norm is not None:
                yield Sample(c.LOCAL_GRADIENT_NORM, (*labels, str(instance.rank)), instance.local_norm)
        yield Sample(c.RANK_AGREEMENT, labels, attempt.noise.agreement)
        if (scale := attempt.noise.value) is not None:
            yield Sample(c.NOISE_SCALE, labels, scale)
        # By name: of two layers of one name, which a model cannot have, one series.
        for layer, norm in dict(attempt.largest_layers()).items():
            yield Sample(c.LAYER_GRADIENT_NORM, (*labels, layer), norm)
        for block, values in attempt.layer_weights().items():
            for layer, value in dict(values).items():
                yield Sample(c.LAYER_WEIGHTS[block], (*labels, layer), value)
        for alert, incident in run.incidents.newest_by_alert().items():
            v = incident.verdict
            rank = "" if v.rank is None else str(v.rank)
            where = (str(v.first_bad_step), str(v.lead_steps), rank, v.layer)
            yield Sample(c.INCIDENT_INFO, (*labels, str(incident.number), alert, v.cause, *where, v.summary), 1)
