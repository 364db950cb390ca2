"""Writes docs/metrics.md from the catalogue of series; with --check, only says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_collector.catalogue import (
    CATALOGUE,
    COLLECTOR_REFUSED,
    DROP_REASONS,
    RECORDS_DROPPED,
    REFUSAL_REASONS,
    RUN,
    Kind,
    Series,
)

PAGE = Path(__file__).with_name("metrics.md")
HEAD = """# Series

What the collector serves under `/metrics`. Made from `collector/foreshock_collector/catalogue.py` by `make docs`; do
not edit by hand.

A series about a run carries the labels `experiment` and `run`; the table names further ones. Prometheus adds `job`
and `instance`. A run has at most a few series a rank and, of layers, at most 16, whatever the size of its model; ranks
and layers never multiply."""
TAIL = """How to read them:

- Counters of events exist at 0 from a run's first report, so that `increase()` sees the first event.
- A time of 0 means never. `time() - foreshock_last_..._timestamp_seconds < 300` is the pattern for alerts. It sees an
  event across a restart of the collector, where the counter reads the same before and after.
- Norms and losses are never NaN here: a gauge keeps its last finite value, and steps that were not finite are counted
  in `foreshock_nonfinite_steps_total`.
- A run's series stay for 15 minutes after its end and then go.
"""


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/metrics.md is not what the catalogue says; run: make docs")


def page() -> str:
    """The whole page."""
    rows = ["| series | type | further labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    rows += [_row(series) for series in CATALOGUE]
    dropped, refused = _quoted(DROP_REASONS), _quoted(REFUSAL_REASONS)
    values = [
        f"Values of `verdict`, and the alert that reports each:\n\n{_verdicts()}",
        f"Values of `reason` in `{RECORDS_DROPPED.name}`: {dropped}; in `{COLLECTOR_REFUSED.name}`: {refused}.",
        f"Alerts, each with its runbook:\n\n{_alerts()}",
    ]
    return "\n\n".join((HEAD, "\n".join(rows), *values, TAIL))


def _row(series: Series) -> str:
    further = _quoted(label for label in series.labels if label not in RUN)
    if not set(RUN) <= set(series.labels):
        further = further or "no labels"
    name = f"`{series.name}`" + (" (`_bucket`, `_sum`, `_count`)" if series.kind is Kind.HISTOGRAM else "")
    meaning = series.help
    if series.buckets:
        meaning += f" Buckets: {', '.join(f'{bound:g}' for bound in series.buckets)}."
    return f"| {name} | {series.kind} | {further} | {series.unit} | {meaning} |"


def _verdicts() -> str:
    rows = [
        "| verdict | title | alert | severity | condition of the run | all values finite |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cause, entry in VERDICT_TABLE.items():
        outcome = entry.outcome
        alert, severity = outcome.alert or "none", outcome.severity or ""
        finite = "yes" if outcome.finite else "no"
        rows.append(f"| `{cause}` | {entry.title} | {alert} | {severity} | {outcome.condition} | {finite} |")
    return "\n".join(rows)


def _alerts() -> str:
    rows = ["| alert | severity | summary |", "| --- | --- | --- |"]
    rows += [f"| [{each.name}](runbooks/{each.name}.md) | {each.severity} | {each.summary} |" for each in ALERTS]
    return "\n".join(rows)


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    main()
