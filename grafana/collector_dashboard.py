"""The dashboard for the collector itself."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from grafana.panels import Json, Panel, Query, dashboard, variables
from grafana.series_panels import ALERTS, RATE, of, stat


def collector() -> Json:
    """Return the dashboard."""
    lag = c.INGEST_LAG.name
    refused = f"increase({c.COLLECTOR_REFUSED.name}[{RATE}])"
    rows = [
        [
            stat(
                "Up for", f"time() - min({_process('start_time_seconds')})", "Time since the process started.", unit="s"
            ),
            stat("Open streams", f"sum({c.COLLECTOR_STREAMS.name})", "Connected recorders, one per node."),
            stat(
                "Runs in memory",
                f"count({of(c.RUN_ACTIVE)})",
                "Active runs, and runs that ended within the retention period.",
            ),
            stat("Ranks reporting", f"sum({of(c.RANKS_REPORTING)})", "Reporting ranks of all runs."),
        ],
        [
            stat("Steps per second", f"sum(rate({of(c.STEPS)}[5m]))", "Steps of all runs.", unit="ops"),
            stat("Ingest lag", f"max({lag})", c.INGEST_LAG.help, unit="s", orange=10, red=60),
            stat(
                "Refused in the last hour",
                f"sum(increase({c.COLLECTOR_REFUSED.name}[1h]))",
                "Refused streams and ranks. The collector's log has the reasons.",
                orange=1,
            ),
            stat("Database", f"sum({c.DATABASE_SIZE.name})", c.DATABASE_SIZE.help, unit="bytes"),
        ],
        [
            Panel(
                title="Records that never arrived",
                description=f"{c.RECORDS_DROPPED.help} By reason; see ForeshockRecordsDropped.",
                kind="timeseries",
                queries=(
                    Query(expr=f"sum by (reason) (increase({of(c.RECORDS_DROPPED)}[{RATE}]))", legend="{{reason}}"),
                ),
                width=16,
            ),
            ALERTS,
        ],
        [
            _chart(
                "Received from recorders",
                "Messages and step records per second. Records that add no steps are repeated or incomplete.",
                (f"sum(rate({c.COLLECTOR_MESSAGES.name}[{RATE}]))", "messages"),
                (f"sum(rate({c.COLLECTOR_RECORDS.name}[{RATE}]))", "records"),
                unit="ops",
            ),
            _chart(
                "Refused and skipped",
                f"{c.COLLECTOR_REFUSED.help} The log has a line for each. Skipped: {c.COLLECTOR_SKIPPED.help}",
                (f"sum by (reason) ({refused})", "{{reason}}"),
                (f"sum(increase({c.COLLECTOR_SKIPPED.name}[{RATE}]))", "skipped"),
                (f"sum(increase({c.COLLECTOR_OTLP_FAILURES.name}[{RATE}]))", "OTLP exports failed"),
            ),
        ],
        [
            _chart(
                "Duration of a commit",
                f"{c.COMMIT_DURATION.help} About one a second; a slow disk shows here first.",
                *(
                    (f"histogram_quantile({q}, sum by (le) (rate({c.COMMIT_DURATION.name}_bucket[{RATE}])))", legend)
                    for q, legend in ((0.5, "median"), (0.99, "99th percentile"))
                ),
                unit="s",
                may_be_empty=True,
            ),
            _chart(
                "Ingest lag",
                f"{c.INGEST_LAG.help} Usually about a second. {c.FLUSH_INTERVAL.help}",
                (f"max({lag})", "lag"),
                (f"max({c.FLUSH_INTERVAL.name})", "recorders send every"),
                unit="s",
            ),
        ],
        [
            _chart(
                "Internal errors in the collector",
                "The log has a traceback of each kind. An error in one run affects only that run.",
                (f"sum by (run, stage) (increase({of(c.RUN_ERRORS)}[{RATE}]))", "{{run}} {{stage}}"),
                (f"sum by (stage) (increase({c.COLLECTOR_ERRORS.name}[{RATE}]))", "{{stage}}"),
            ),
            _chart(
                "Notifications of the collector itself",
                "Messages to --notify-url: accepted, dropped, or waiting.",
                (f"sum by (result) (increase({c.NOTIFICATIONS.name}[{RATE}]))", "{{result}}"),
                (f"sum({c.NOTIFICATIONS_PENDING.name})", "pending"),
            ),
        ],
        [
            _chart(
                "Longest silence of a rank, per run",
                "Usually about a second. If all runs rise together, suspect the network or this collector.",
                (f"max by (experiment, run) (time() - {of(c.LAST_REPORT)})", "{{run}}"),
                unit="s",
                may_be_empty=True,
            ),
            _chart(
                "Series of ranks that are left out, per run",
                "Above 0, the run would have more series than --run-series: not every rank is in Prometheus.",
                (of(c.SERIES_WITHHELD), "{{run}}"),
            ),
        ],
        [
            _chart(
                "CPU",
                "1 is one core; the collector computes on a single core.",
                (f"sum(rate(process_cpu_seconds_total[{RATE}]) and on (job, instance) {c.BUILD_INFO.name})", "cores"),
                width=8,
            ),
            _chart(
                "Memory",
                "Grows with the ranks and layers of active runs, not with time.",
                (f"sum({_process('resident_memory_bytes')})", "resident"),
                unit="bytes",
                width=8,
            ),
            _chart(
                "File descriptors",
                "One per stream and one per viewer. At the limit, no one else can connect.",
                (f"sum({_process('open_fds')})", "open"),
                (f"sum({_process('max_fds')})", "limit"),
                logarithmic=True,
                width=8,
            ),
        ],
    ]
    title, text = (
        "Foreshock: collector",
        "Whether the collector receives from all recorders and stores what it receives.",
    )
    return dashboard("foreshock-collector", title, text, variables(one_run=False), rows)


def _process(name: str) -> str:
    """Return a selector of a process_* series: other programs export the same names to Prometheus."""
    return f"process_{name} and on (job, instance) {c.BUILD_INFO.name}"


def _chart(
    title: str, description: str, *queries: tuple[str, str], may_be_empty: bool = False, **changes: object
) -> Panel:
    """Return a chart over time. queries: PromQL and legend of each."""
    asked = tuple(Query(expr=expr, legend=legend, may_be_empty=may_be_empty) for expr, legend in queries)
    values: dict[str, object] = {"title": title, "description": description, "kind": "timeseries", "queries": asked}
    return Panel(**(values | changes))  # type: ignore[arg-type]
