"""Alerts on the monitoring itself: lost records, and a collector that does not work."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, VALUE, Alert
from foreshock_collector.alerting.condition import Condition
from foreshock_collector.alerting.lookups import WINDOW, Lookup, increase

_COLLECTOR = "{{ $labels.instance }}"
_NOT_COMMIT = 'stage!="commit"'
_FAILED_COMMIT = 'stage="commit"'
_FAILED_LOAD = 'stage="load"'


def _grown(series: c.Series, window: str, matchers: str = "") -> str:
    """Condition: a counter of a collector has grown within the window."""
    selector = series.name + (f"{{{matchers}}}" if matchers else "")
    return f"sum by (instance) (increase({selector}[{window}])) > 0"


def _loaded_with_errors(offset: str = "") -> str:
    newest = f"last_over_time({c.COLLECTOR_ERRORS.name}{{{_FAILED_LOAD}}}{WINDOW}{offset})"
    return f"max by (instance) ({newest}) > 0"


# A step that started and never finished is a failure of the run and not of the monitoring: every crash leaves some.
_LOST = 'reason!="never_finished"'
MONITOR = (
    Alert(
        name="ForeshockRecordsDropped",
        severity="warning",
        condition=Condition(
            promql=f"sum by (experiment, run) (increase({c.RECORDS_DROPPED.name}{{{_LOST}}}[10m])) > 0"
        ),
        keep_firing_for="5m",
        summary="Step records were lost, so a warning sign may have been missed.",
        description=(
            f"Run {RUN} lost step records in the last ten minutes.",
            Lookup(
                query=f"sum by (reason) ({increase(c.RECORDS_DROPPED, '10m', _LOST)}) > 0",
                text='By reason: {{ range $i, $lost := . | sortByLabel "reason" }}{{ if $i }}, {{ end }}'
                '{{ $lost.Labels.reason }} {{ $lost.Value | printf "%.0f" }}{{ end }}.',
            ),
            "The runbook explains each reason.",
        ),
        values=NEWEST_STEP,
    ),
    Alert(
        name="ForeshockCollectorDown",
        severity="critical",
        condition=Condition(promql=f"absent_over_time({c.BUILD_INFO.name}{WINDOW})"),
        wait="30s",
        summary="Prometheus cannot scrape any Foreshock collector, so no run is monitored.",
        description=(
            "Training continues, but no one is warned.",
            "Each rank keeps its newest steps in memory and sends them once the collector is back.",
            "The runbook link points to that collector: if it does not open, start the collector first.",
        ),
        of_run=False,
    ),
    Alert(
        name="ForeshockCommitsFailing",
        severity="critical",
        condition=Condition(promql=_grown(c.COLLECTOR_ERRORS, "2m", _FAILED_COMMIT)),
        # One failure alone, as by a backup that holds the database, is in sight for less than that.
        wait="2m",
        keep_firing_for="2m",
        summary="The collector cannot write to its database.",
        description=(
            f"The collector {_COLLECTOR} has failed to commit for two minutes, so it acknowledges nothing.",
            "Alerts still work, and each rank keeps its newest steps in memory until a commit succeeds.",
            "The usual cause is a full disk: the collector's log has the error.",
        ),
        of_run=False,
    ),
    Alert(
        name="ForeshockIngestLagging",
        severity="warning",
        condition=Condition(promql=f"max by (instance) (last_over_time({c.INGEST_LAG.name}{WINDOW})) > 30"),
        wait="1m",
        keep_firing_for="2m",
        summary="The collector takes more than 30 seconds to store what it receives.",
        description=(
            f"On the collector {_COLLECTOR}, a step record has been waiting for {VALUE} seconds.",
            "It should be stored within about one second. The ranks keep it in memory until then.",
        ),
        of_run=False,
    ),
    Alert(
        name="ForeshockRecorderRefused",
        severity="warning",
        condition=Condition(promql=_grown(c.COLLECTOR_REFUSED, "10m")),
        keep_firing_for="5m",
        summary="The collector refuses records, so a run or some of its ranks are not monitored.",
        description=(
            f"The collector {_COLLECTOR} has refused recorders or ranks in the last ten minutes.",
            Lookup(
                query=f"sum by (reason) (increase({c.COLLECTOR_REFUSED.name}[10m])) > 0",
                text='By reason: {{ range $i, $refused := . | sortByLabel "reason" }}{{ if $i }}, {{ end }}'
                '{{ $refused.Labels.reason }} {{ $refused.Value | printf "%.0f" }}{{ end }}.',
            ),
            "The collector's log has one line for each, with the peer.",
        ),
        of_run=False,
    ),
    Alert(
        name="ForeshockCollectorErrors",
        severity="warning",
        # Errors while loading the database precede the first scrape: they count for a quarter of an hour.
        condition=Condition(
            promql=f"{_grown(c.RUN_ERRORS, '10m')}\n"
            f"or\n{_grown(c.COLLECTOR_ERRORS, '10m', _NOT_COMMIT)}\n"
            f"or\n({_loaded_with_errors()} unless {_loaded_with_errors(' offset 15m')})"
        ),
        keep_firing_for="5m",
        summary="The collector has internal errors, so a run may not be evaluated.",
        description=(
            f"The collector {_COLLECTOR} has had internal errors in the last ten minutes.",
            Lookup(
                query=f"topk(5, sum by (run, stage) (increase({c.RUN_ERRORS.name}[10m]))) > 0",
                text='Runs affected: {{ range $i, $failed := . | sortByLabel "run" }}{{ if $i }}, {{ end }}'
                "{{ $failed.Labels.run }} ({{ $failed.Labels.stage }}){{ end }}.",
            ),
            "The collector's log has a traceback of each kind.",
        ),
        of_run=False,
    ),
)
