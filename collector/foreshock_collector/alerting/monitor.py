"""Alerts on the monitoring itself: lost records, and a collector that does not work."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, Alert
from foreshock_collector.alerting.lookups import WINDOW, Lookup, increase

# A step that was launched and never finished is the run's trouble and not the monitor's: every crash leaves some.
_LOST = 'reason!="never_finished"'
MONITOR = (
    Alert(
        name="ForeshockRecordsDropped",
        severity="warning",
        expr=f"sum by (experiment, run) (increase({c.RECORDS_DROPPED.name}{{{_LOST}}}[10m])) > 0",
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
        expr=f"absent_over_time({c.COLLECTOR_START.name}{WINDOW})",
        wait="30s",
        summary="Prometheus cannot scrape any Foreshock collector, so no run is monitored.",
        description=(
            "Training continues, but nobody is warned.",
            "Each rank keeps its newest steps in memory and sends them once the collector is back.",
            "The runbook link points to that collector: if it does not open, start the collector first.",
        ),
        of_run=False,
    ),
)
