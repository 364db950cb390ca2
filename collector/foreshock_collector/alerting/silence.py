"""Alerts on ranks that do not report although their run is active."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, VALUE, Alert
from foreshock_collector.alerting.condition import Condition, by_run
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.alerting.lookups import WINDOW, Lookup, newest, number

_ACTIVE = f"and on (experiment, run) {by_run(c.RUN_ACTIVE)} == 1"
_SILENT_SECONDS = 60
_RANKS_NAMED = 8


def _silent_ranks(facts: Facts) -> list[str]:
    """Return the ranks that do not report, the one that has been silent for longest at the beginning."""
    last = {labels[0]: seconds for labels, seconds in facts.all(c.LAST_REPORT).items()}
    return sorted((rank for rank in last if facts.now - last[rank] > _SILENT_SECONDS), key=lambda rank: last[rank])


def _silent(facts: Facts) -> float | None:
    return len(_silent_ranks(facts)) or None if facts.value(c.RUN_ACTIVE) == 1 else None


def _missing(facts: Facts) -> float | None:
    expected, reporting = facts.value(c.RANKS_EXPECTED), facts.value(c.RANKS_REPORTING)
    if expected is None or reporting is None or facts.value(c.RUN_ACTIVE) != 1 or expected <= reporting:
        return None
    return expected - reporting


def _longest(facts: Facts) -> str | None:
    ranks = _silent_ranks(facts)[:_RANKS_NAMED]
    return f"Longest silence: rank {', '.join(ranks)}." if ranks else None


def _most_silent(facts: Facts) -> str | None:
    last = facts.all(c.LAST_REPORT)
    return min(last, key=lambda labels: last[labels])[0] if last else None


SILENCE = (
    Alert(
        name="ForeshockRankSilent",
        severity="warning",
        condition=Condition(
            promql="count by (experiment, run) "
            f"(time() - last_over_time({c.LAST_REPORT.name}{WINDOW}) > {_SILENT_SECONDS})\n{_ACTIVE}",
            value=_silent,
        ),
        # A recorder that has lost its collector is back within 30 seconds, so this covers a restart of the collector.
        wait="1m",
        summary="Ranks of a running job have not reported for more than a minute.",
        description=(
            f"Ranks of run {RUN} that do not report: {VALUE}.",
            Lookup(
                query=f"topk({_RANKS_NAMED}, time() - {newest(c.LAST_REPORT)} > {_SILENT_SECONDS})",
                text="Longest silence: rank {{ range $i, $rank := . }}{{ if $i }}, {{ end }}"
                '{{ $rank | label "rank" }}{{ end }}.',
                render=_longest,
            ),
        ),
        values={
            **NEWEST_STEP,
            "worst_rank": Lookup(
                query=f"topk(1, time() - {newest(c.LAST_REPORT)})",
                text='{{ . | first | label "rank" }}',
                render=_most_silent,
            ),
        },
    ),
    Alert(
        name="ForeshockRanksMissing",
        severity="warning",
        condition=Condition(
            promql=f"{by_run(c.RANKS_EXPECTED)}\n- on (experiment, run) {by_run(c.RANKS_REPORTING)} > 0\n{_ACTIVE}",
            value=_missing,
        ),
        wait="2m",
        summary="A running job has fewer ranks than it started with.",
        description=(
            f"Run {RUN} is missing {VALUE} of its ranks.",
            number(c.RANKS_EXPECTED, sentence="It started with {}."),
        ),
        values=NEWEST_STEP,
    ),
)
