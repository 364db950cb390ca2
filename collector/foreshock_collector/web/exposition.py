"""The runs as Prometheus series: a collector for prometheus-client, in a registry that its owner injects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.catalogue import Series
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import Run
from foreshock_collector.web.samples import Labels, Samples, families_of
from foreshock_collector.web.shown_ranks import ShownRanks

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
    resolve. silent: seconds without a report that end a run. most: series of a run, those of its ranks included.
    """

    def __init__(
        self, runs: Runs, clock: Callable[[], float], *, ended_seconds: float, silent: float, most: float = math.inf
    ) -> None:
        self._runs = runs
        self._clock = clock
        self._ended_seconds = ended_seconds
        self._silent = silent
        self._most = most
        self._shown = ShownRanks()

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
        # Of all ranks, shown or not.
        found = [*self._own_samples(run, now), *_rank_samples(run, run.newest.instances.values())]
        found = [each for each in found if each.series.kind is not c.Kind.HISTOGRAM]
        samples = {each.series.name: dict(zip(each.further, each.values, strict=True)) for each in found if each.values}
        return Facts(experiment=run.experiment, run=run.name, now=now, samples=samples)

    def samples(self) -> Iterator[Samples]:
        """Yield the samples of one run after the other."""
        now = self._clock()
        for run in self._runs:
            # All samples of a run or none: a run that fails half-way affects no other.
            with run.errors.caught("expose"):
                if run.ended_for(now, self._silent) >= self._ended_seconds:
                    continue
                yield from self._run_samples(run, now)
            errors = run.errors.counts.items()
            yield Samples(c.RUN_ERRORS, (run.experiment, run.name), {(stage,): count for stage, count in errors})

    def _run_samples(self, run: Run, now: float) -> list[Samples]:
        own = list(self._own_samples(run, now))
        room = self._most - _series_in(own)
        ranks = run.newest.instances.values()
        withheld = 0
        shown = list(_rank_samples(run, ranks))
        if (wanted := _series_in(shown)) > room:
            shown = list(_rank_samples(run, self._shown.of(run.newest, int(room // len(shown)), now)))
            withheld = wanted - _series_in(shown)
        return [*own, *shown, Samples(c.SERIES_WITHHELD, (run.experiment, run.name), {(): withheld})]

    def _own_samples(self, run: Run, now: float) -> Iterator[Samples]:
        owner, totals = (run.experiment, run.name), run.totals
        for values, names in (
            (totals.gauges, c.COLUMN_GAUGES),
            (totals.last, _TIMES),
            (totals.event_steps, _STEPS),
            (totals.counters, _COUNTERS),
        ):
            for name, series in names.items():
                if name in values:
                    yield Samples(series, owner, {(): values[name]})
        yield Samples(c.NONFINITE_STEPS, owner, {tuple(key.split()): n for key, n in totals.nonfinite.items()})
        yield Samples(c.RECORDS_DROPPED, owner, {(reason,): count for reason, count in totals.dropped.items()})
        open_ = run.incidents.open_by_verdict()
        yield Samples(c.INCIDENTS, owner, {(verdict,): count for verdict, count in totals.incidents.items()})
        yield Samples(c.OPEN_INCIDENTS, owner, {(verdict,): open_[verdict] for verdict in totals.incidents})
        yield Samples(
            c.LAST_INCIDENT, owner, {(verdict,): totals.last_incident[verdict] for verdict in totals.incidents}
        )
        yield Samples.from_histogram(c.GRADIENT_NORM, owner, totals.norms)
        yield Samples.from_histogram(c.STEP_DURATION, owner, totals.durations)
        yield Samples(c.STALL_THRESHOLD, owner, {(): run.stall_threshold()})
        yield Samples(c.RUN_ACTIVE, owner, {(): run.active(now, self._silent)})
        attempt = run.newest
        ranks = attempt.instances.values()
        yield Samples(c.RANKS_EXPECTED, owner, {(): attempt.world_size})
        yield Samples(c.RANKS_REPORTING, owner, {(): sum(instance.reporting for instance in ranks)})
        hello = attempt.hello
        facts = (str(attempt.number), hello.model.type, hello.optimizer.type, hello.clip)
        yield Samples(c.RUN_INFO, owner, {facts: 1})
        yield Samples(c.RANK_AGREEMENT, owner, {(): attempt.noise.agreement})
        if (scale := attempt.noise.value) is not None:
            yield Samples(c.NOISE_SCALE, owner, {(): scale})
        # By name: of two layers of one name, which a model cannot have, one series.
        yield Samples(c.LAYER_GRADIENT_NORM, owner, {(layer,): norm for layer, norm in attempt.largest_layers()})
        for block, layers in attempt.layer_weights().items():
            yield Samples(c.LAYER_WEIGHTS[block], owner, {(layer,): value for layer, value in layers})
        incidents: dict[Labels, float] = {}
        for alert, incident in run.incidents.newest_by_alert().items():
            v = incident.verdict
            rank = "" if v.rank is None else str(v.rank)
            where = (str(v.first_bad_step), str(v.lead_steps), rank, v.layer)
            incidents[(str(incident.number), alert, v.cause, *where, v.summary)] = 1
        yield Samples(c.INCIDENT_INFO, owner, incidents)


def _rank_samples(run: Run, ranks: Iterable[Instance]) -> Iterator[Samples]:
    owner = run.experiment, run.name
    # One that has left has not fallen silent.
    yield Samples(c.LAST_REPORT, owner, {_label(i.rank): i.last_report for i in ranks if not i.closed})
    norms = {_label(i.rank): i.local_norm for i in ranks if i.local_norm is not None}
    yield Samples(c.LOCAL_GRADIENT_NORM, owner, norms)


def _series_in(samples: Iterable[Samples]) -> int:
    return sum(len(each.values) + (each.series.kind is c.Kind.HISTOGRAM) for each in samples)


@cache
def _label(rank: int) -> Labels:
    return (str(rank),)
