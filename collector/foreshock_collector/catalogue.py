"""Every Prometheus series that the collector exports: name, type, labels, unit, meaning.

Exposition, the table in docs/metrics.md, dashboards, alert rules and their linters read this and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_protos.columns import COLUMNS


class Kind(StrEnum):
    """Prometheus metric types in use."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Defines one family of series."""

    name: str
    """As exported; a counter's ends in `_total`, an info's in `_info`."""
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    """Base unit, empty for a plain number."""
    help: str
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without +Inf."""


RUN = ("experiment", "run")
"""Every run-level series carries these."""

VERDICTS = tuple(VERDICT_TABLE)
"""The closed list of causes. An incident never carries `healthy`."""

INCIDENT_VERDICTS = tuple(cause for cause, entry in VERDICT_TABLE.items() if entry.outcome.alert)
"""All but `healthy` and `amp_overflow`, which need no action. Their counters exist at 0 from a run's first report."""

DROP_REASONS = ("probe_error", "ring_overrun", "never_finished", "given_up")
"""Why a step record of a rank is missing: the probe failed on it; the ring was overwritten before it was read (the
collector was away for too long); its step was launched and never finished; or its job ended while no collector took it,
and its ring was removed."""

RUN_STAGES = ("ingest", "evaluate", "store", "expose", "page")
"""Where the collector may fail on a run: ingesting its records, evaluating its steps, storing the results, exporting
/metrics, answering the page."""

COLLECTOR_STAGES = ("ingest", "load", "commit", "page")
"""Where the collector may fail on all runs: a Hello, loading the database, a commit, an answer about all runs."""

REFUSAL_REASONS = (
    *("malformed", "schema_version", "invalid_value", "no_hello"),
    *("contradiction", "collector_error", "limit", "token"),
)
"""Why a recorder or one of its ranks is refused: the message cannot be decoded or is empty; it uses another schema
version; a value is out of range; a rank sends records before its hello; its hello contradicts what is known of its
launch; the collector failed on it; runs, launches, ranks, streams or layers are too many; or the recorder shows no
token, one for other experiments, or one that was removed or expired while its stream was open."""

NOTIFICATION_RESULTS = ("sent", "failed")
"""How a notification of the collector itself ended: accepted by the receiver; or refused by it, or dropped because too
many were waiting."""

_POWERS_OF_TEN = tuple(10.0**e for e in range(-6, 9))
_DURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def _gauge(name: str, help_: str, unit: str = "", labels: tuple[str, ...] = RUN) -> Series:
    return Series(name=name, kind=Kind.GAUGE, labels=labels, unit=unit, help=help_)


def _counter(name: str, help_: str, labels: tuple[str, ...] = RUN) -> Series:
    return Series(name=name, kind=Kind.COUNTER, labels=labels, unit="", help=help_)


COLUMN_GAUGES = {
    column.name: _gauge(column.gauge.series, column.gauge.help, column.unit)
    for column in COLUMNS
    if column.gauge is not None
}
"""Series that export the newest finite value of a column, by the column's name. Those that are used by name have a
constant below."""
GLOBAL_GRADIENT_NORM = COLUMN_GAUGES["global_norm"]
LOCAL_GRADIENT_NORM = _gauge(
    "foreshock_local_gradient_norm",
    "L2 norm of a rank's own gradient before the all-reduce, at its newest finite step.",
    labels=(*RUN, "rank"),
)
LAYER_GRADIENT_NORM = _gauge(
    "foreshock_layer_gradient_norm",
    "L2 norm of a layer's averaged gradient at its newest finite step, for at most 16 layers: those with the largest "
    "norms in the last 64 steps.",
    labels=(*RUN, "layer"),
)
_SAMPLED = (
    "estimated from a sample of its elements, for at most 16 layers: those with the largest update ratios lately."
)
LAYER_WEIGHTS = {
    "parameter_layer_norms": _gauge(
        "foreshock_layer_parameter_norm",
        f"L2 norm of a layer's weights before the newest measured step, {_SAMPLED}",
        labels=(*RUN, "layer"),
    ),
    "update_layer_ratios": _gauge(
        "foreshock_layer_update_ratio",
        "Norm of an optimizer step's update of a layer over the norm of its weights, at the newest measured step, "
        + _SAMPLED,
        "ratio",
        (*RUN, "layer"),
    ),
    "first_moment_layer_norms": _gauge(
        "foreshock_layer_first_moment_norm",
        "L2 norm of the optimizer's first moment of a layer (Adam's `exp_avg`, SGD's `momentum_buffer`) before the "
        f"newest measured step, {_SAMPLED}",
        labels=(*RUN, "layer"),
    ),
    "second_moment_layer_norms": _gauge(
        "foreshock_layer_second_moment_norm",
        "Square root of the sum of the optimizer's second moment of a layer (Adam's `exp_avg_sq`) before the newest "
        f"measured step, {_SAMPLED}",
        labels=(*RUN, "layer"),
    ),
}
"""Series of what blocks of layers measured of the weights, by the block's name."""
RANK_AGREEMENT = _gauge(
    "foreshock_rank_agreement_ratio",
    "Squared norm of the averaged gradient over the mean squared local norm, at the newest step with both: 1 if all "
    "ranks see the same data, 1 over the world size if they share only noise.",
    "ratio",
)
NOISE_SCALE = _gauge(
    "foreshock_gradient_noise_scale",
    "Gradient noise scale in batches of one rank, smoothed over about a hundred steps. Far more ranks than this, or "
    "far larger batches, bring little benefit.",
)
GRADIENT_NORM = Series(
    name="foreshock_gradient_norm",
    kind=Kind.HISTOGRAM,
    labels=RUN,
    unit="",
    help="Finite global norms of every step, including steps between two scrapes.",
    buckets=_POWERS_OF_TEN,
)
GRADIENT_ABSOLUTE_MAXIMUM = COLUMN_GAUGES["gradient_absolute_maximum"]
CLIP_COEFFICIENT = COLUMN_GAUGES["clip_coefficient"]
PARAMETER_NORM = COLUMN_GAUGES["parameter_norm"]
UPDATE_RATIO = COLUMN_GAUGES["update_ratio"]
FIRST_MOMENT_NORM = COLUMN_GAUGES["first_moment_norm"]
SECOND_MOMENT_NORM = COLUMN_GAUGES["second_moment_norm"]
LOSS = COLUMN_GAUGES["loss"]
LEARNING_RATE = COLUMN_GAUGES["learning_rate"]
LOSS_SCALE = COLUMN_GAUGES["loss_scale"]
STEP = COLUMN_GAUGES["step"]
STEPS = _counter("foreshock_steps_total", "Optimizer steps received.")
ABANDONED_STEPS = _counter(
    "foreshock_abandoned_steps_total",
    "Steps that the script or its GradScaler skipped after they were observed or measured, without calling the "
    "optimizer. Not counted as steps.",
)
CLIPPED_STEPS = _counter("foreshock_clipped_steps_total", "Steps whose gradient was scaled down.")
SKIPPED_STEPS = _counter("foreshock_skipped_steps_total", "Steps that the optimizer skipped.")
SHADOW_CLIPPED_STEPS = _counter(
    "foreshock_shadow_clipped_steps_total", "Steps that would have been clipped, in a dry run."
)
SHADOW_SKIPPED_STEPS = _counter(
    "foreshock_shadow_skipped_steps_total", "Steps that would have been skipped, in a dry run."
)
GRADIENT_SPIKES = _counter("foreshock_gradient_spikes_total", "Steps whose global norm was far above its history.")
GRADIENT_BUILD_UPS = _counter(
    "foreshock_gradient_build_ups_total", "Climbs of the global norm over several steps, or spikes in quick succession."
)
LOSS_SPIKES = _counter("foreshock_loss_spikes_total", "Steps whose loss was far above its history.")
NONFINITE_STEPS = _counter(
    "foreshock_nonfinite_steps_total",
    "Steps with NaN or Inf in the loss or the gradient.",
    (*RUN, "source", "kind"),
)
STEP_DURATION = Series(
    name="foreshock_step_duration_seconds",
    kind=Kind.HISTOGRAM,
    labels=RUN,
    unit="seconds",
    help="Time from one optimizer step to the next.",
    buckets=_DURATIONS,
)
LAST_SPIKE = _gauge(
    "foreshock_last_spike_timestamp_seconds", "Time at which the collector saw the last spike; 0 if never.", "seconds"
)
LAST_BUILD_UP = _gauge(
    "foreshock_last_build_up_timestamp_seconds",
    "Time at which the collector saw the last build-up; 0 if never.",
    "seconds",
)
LAST_LOSS_SPIKE = _gauge(
    "foreshock_last_loss_spike_timestamp_seconds",
    "Time at which the collector saw the last loss spike; 0 if never.",
    "seconds",
)
LAST_SPIKE_STEP = _gauge("foreshock_last_spike_step", "Step of the last spike; absent before the first.")
LAST_BUILD_UP_STEP = _gauge(
    "foreshock_last_build_up_step", "Step at which the last build-up began; absent before the first."
)
LAST_LOSS_SPIKE_STEP = _gauge("foreshock_last_loss_spike_step", "Step of the last loss spike; absent before the first.")
LAST_NONFINITE = _gauge(
    "foreshock_last_nonfinite_timestamp_seconds",
    "Time at which the collector saw the last step with NaN or Inf; 0 if never.",
    "seconds",
)
LAST_INCIDENT = _gauge(
    "foreshock_last_incident_timestamp_seconds",
    "Time at which the collector opened the last incident with this verdict; 0 if never.",
    "seconds",
    (*RUN, "verdict"),
)
OPEN_INCIDENTS = _gauge(
    "foreshock_open_incidents",
    "Open incidents with this verdict. The incident of a run that died closes once a later attempt makes steps, or "
    "when its series expire.",
    labels=(*RUN, "verdict"),
)
LAST_REPORT = _gauge(
    "foreshock_last_report_timestamp_seconds",
    "Time of a rank's last report, with or without steps.",
    "seconds",
    (*RUN, "rank"),
)
LAST_STEP = _gauge(
    "foreshock_last_step_timestamp_seconds", "Time at which the collector received the newest step.", "seconds"
)
STALL_THRESHOLD = _gauge(
    "foreshock_stall_threshold_seconds",
    "Time without a step after which the run counts as stalled: 20 median steps, between 2 and 30 minutes; 10 minutes "
    "until an attempt has made ten steps.",
    "seconds",
)
RUN_ACTIVE = _gauge("foreshock_run_active", "1 while any rank of the run is active, 0 once all have left.")
RANKS_EXPECTED = _gauge("foreshock_run_ranks_expected", "World size of the newest attempt.")
RANKS_REPORTING = _gauge(
    "foreshock_run_ranks_reporting", "Ranks of the newest attempt that have registered and not left."
)
SERIES_WITHHELD = _gauge(
    "foreshock_run_series_withheld",
    "Series of single ranks that are left out, since the run would have more than `--run-series`. The first ranks have "
    "theirs, and the 16 others that stand out most: silent ones, and then the most unusual local norms.",
)
RUN_INFO = Series(
    name="foreshock_run_info",
    kind=Kind.INFO,
    labels=(*RUN, "attempt", "model", "optimizer", "clip"),
    unit="",
    help="Facts about an attempt: its model, optimizer and clipping.",
)
INCIDENTS = _counter("foreshock_incidents_total", "Incidents opened.", (*RUN, "verdict"))
INCIDENT_INFO = Series(
    name="foreshock_incident_info",
    kind=Kind.INFO,
    labels=(*RUN, "incident", "alert", "verdict", "first_step", "lead_steps", "rank", "layer", "summary"),
    unit="",
    help="The newest incident of a run for each alert. Rank and layer are empty if unknown; lead_steps is 0 if nothing "
    "preceded the first non-finite step.",
)
RECORDS_DROPPED = _counter(
    "foreshock_records_dropped_total", "Step records of a rank that never reached the collector.", (*RUN, "reason")
)
RUN_ERRORS = _counter(
    "foreshock_run_errors_total",
    "Internal errors of the collector that affect only this run, by stage. The log has each kind once.",
    (*RUN, "stage"),
)
COLLECTOR_ERRORS = _counter(
    "foreshock_collector_errors_total",
    "Internal errors of the collector that affect all runs, by stage. While commits fail, the collector is not ready, "
    "acknowledges nothing, and retries.",
    ("stage",),
)
BUILD_INFO = Series(
    name="foreshock_build_info",
    kind=Kind.INFO,
    labels=("version", "python"),
    unit="",
    help="Version of this collector and of its Python.",
)
COLLECTOR_STREAMS = _gauge("foreshock_collector_streams", "Open streams of recorders, one per node.", labels=())
COLLECTOR_MESSAGES = _counter("foreshock_collector_messages_total", "Messages received from recorders.", ())
COLLECTOR_SKIPPED = _counter(
    "foreshock_collector_skipped_messages_total",
    "Messages of a kind that this collector does not know, from a newer recorder.",
    (),
)
COLLECTOR_RECORDS = _counter(
    "foreshock_collector_records_total", "Step records received from ranks, including repeated ones.", ()
)
COLLECTOR_REFUSED = _counter(
    "foreshock_collector_refused_total", "Streams and single ranks that the collector refused, by reason.", ("reason",)
)
COLLECTOR_OTLP_FAILURES = _counter(
    "foreshock_collector_otlp_failures_total", "Exports to `--otlp-endpoint` that failed.", ()
)
COMMIT_DURATION = Series(
    name="foreshock_collector_commit_seconds",
    kind=Kind.HISTOGRAM,
    labels=(),
    unit="seconds",
    help="Duration of commits to the database, including failed ones.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
INGEST_LAG = _gauge(
    "foreshock_collector_ingest_lag_seconds",
    "Age of the oldest record that waits for its commit; 0 if none waits.",
    "seconds",
    (),
)
FLUSH_INTERVAL = _gauge(
    "foreshock_collector_flush_interval_seconds",
    "Interval at which the collector asks recorders to send: --ack-seconds, or longer while it is busy.",
    "seconds",
    (),
)
NOTIFICATIONS = _counter(
    "foreshock_collector_notifications_total",
    "Messages to --notify-url, by result: sent, or failed and dropped.",
    ("result",),
)
NOTIFICATIONS_PENDING = _gauge(
    "foreshock_collector_notifications_pending", "Messages that --notify-url has not accepted yet.", labels=()
)
DATABASE_SIZE = _gauge(
    "foreshock_collector_database_bytes", "Size of the database on disk, including its write-ahead log.", "bytes", ()
)

PROCESS = tuple(
    Series(name=f"process_{name}", kind=kind, labels=(), unit=unit, help=help_)
    for name, kind, unit, help_ in (
        ("start_time_seconds", Kind.GAUGE, "seconds", "Time at which the process started."),
        ("cpu_seconds_total", Kind.COUNTER, "seconds", "User and system CPU time spent."),
        ("resident_memory_bytes", Kind.GAUGE, "bytes", "Resident memory."),
        ("virtual_memory_bytes", Kind.GAUGE, "bytes", "Virtual memory."),
        ("open_fds", Kind.GAUGE, "", "Open file descriptors."),
        ("max_fds", Kind.GAUGE, "", "Most file descriptors that may be open."),
    )
)
"""What prometheus-client itself exports of the collector's process, on Linux."""

_NAMED = tuple(value for value in list(globals().values()) if isinstance(value, Series))
CATALOGUE: tuple[Series, ...] = tuple(
    dict.fromkeys((*_NAMED, *LAYER_WEIGHTS.values(), *COLUMN_GAUGES.values(), *PROCESS))
)
"""All of them, in the order above."""
