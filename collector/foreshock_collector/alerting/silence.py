"""Alerts on ranks that do not report although their run is active."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, VALUE, Alert, by_run
from foreshock_collector.alerting.lookups import WINDOW, Lookup, newest, number

_ACTIVE = f"and on (experiment, run) {by_run(c.RUN_ACTIVE)} == 1"
SILENCE = (
    Alert(
        name="ForeshockRankSilent",
        severity="warning",
        expr=f"count by (experiment, run) (time() - last_over_time({c.LAST_REPORT.name}{WINDOW}) > 60)\n{_ACTIVE}",
        # A recorder that has lost its collector is back within 30 seconds, so this covers a restart of the collector.
        wait="1m",
        summary="Ranks of a running job have not reported for more than a minute.",
        description=(
            f"Ranks of run {RUN} that do not report: {VALUE}.",
            Lookup(
                query=f"topk(8, time() - {newest(c.LAST_REPORT)} > 60)",
                text="Longest silence: rank {{ range $i, $rank := . }}{{ if $i }}, {{ end }}"
                '{{ $rank | label "rank" }}{{ end }}.',
            ),
        ),
        values={
            **NEWEST_STEP,
            "worst_rank": Lookup(
                query=f"topk(1, time() - {newest(c.LAST_REPORT)})", text='{{ . | first | label "rank" }}'
            ),
        },
    ),
    Alert(
        name="ForeshockRanksMissing",
        severity="warning",
        expr=f"{by_run(c.RANKS_EXPECTED)}\n- on (experiment, run) {by_run(c.RANKS_REPORTING)} > 0\n{_ACTIVE}",
        wait="2m",
        summary="A running job has fewer ranks than it started with.",
        description=(
            f"Run {RUN} is missing {VALUE} of its ranks.",
            number(c.RANKS_EXPECTED, sentence="It started with {}."),
        ),
        values=NEWEST_STEP,
    ),
)
