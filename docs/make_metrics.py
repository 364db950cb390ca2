"""Generates docs/metrics.md from the catalogue of series; with --check, only verifies that it is up to date."""

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

The collector serves these series under `/metrics`. `make docs` generates this page from
`collector/foreshock_collector/catalogue.py`; do not edit it by hand.

Every series about a run has the labels `experiment` and `run`; the table lists further labels. Prometheus adds `job`
and `instance`. Whatever its model, a run has a few series per rank and covers at most 16 layers; ranks and layers
never multiply. In a run that would have more than `--run-series`, 20,000 by default, only the first ranks have series,
and 16 that stand out; `foreshock_run_series_withheld` says how many series are left out."""
TAIL = """Notes:

- Counters of events exist at 0 from a run's first report, so that `increase()` sees the first event.
- A timestamp of 0 means never. Alerts use the pattern `time() - foreshock_last_..._timestamp_seconds < 300`. It detects
  an event across a restart of the collector, where a counter has the same value before and after.
- Norms and losses are never NaN: a gauge keeps its last finite value, and `foreshock_nonfinite_steps_total` counts
  non-finite steps.
- Scrapers that ask for OpenMetrics get it, as Prometheus does by default.
- A run's series expire 15 minutes after it ends.
"""


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/metrics.md is out of date; run: make docs")


def page() -> str:
    """Return the whole page."""
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
