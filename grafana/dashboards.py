"""The dashboards for all runs, one run, its ranks, its layers, and the collector."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from grafana.collector_dashboard import collector
from grafana.panels import Json, Panel, Query, dashboard, variables
from grafana.series_panels import ALERTS, RATE, gauge, increase, of, rate, shares, stat

_RUN_LINK = (
    "/d/foreshock-run?${__url_time_range}&var-run=${__data.fields.run}&var-experiment=${__data.fields.experiment}"
)
_PAGE_LINK = "${page}/run/${__data.fields.run:percentencode}"


_INCIDENTS = Panel(
    title="Newest incidents per run",
    description="What went wrong, at which step, how many steps after the first sign, on which rank and layer. "
    "The run's page shows the evidence and what to try.",
    kind="table",
    queries=(Query(expr=of(c.INCIDENT_INFO), instant=True, may_be_empty=True),),
    width=16,
    columns={
        "run": "run",
        "verdict": "verdict",
        "first_step": "since step",
        "lead_steps": "lead, steps",
        "rank": "rank",
        "layer": "layer",
        "summary": "what happened",
    },
    links=(("Run page", _PAGE_LINK),),
)
_NORM = gauge(
    "Global gradient norm",
    c.GLOBAL_GRADIENT_NORM,
    "A climb over several steps precedes an explosion; a single spike usually does not.",
    logarithmic=True,
)
_LOSS = gauge("Loss", c.LOSS, "A loss that climbs while the norm is flat diverges without exploding.")


def fleet() -> Json:
    """All runs."""
    active = f"{of(c.RUN_ACTIVE)} == 1"
    missing = f"sum(({of(c.RANKS_EXPECTED)} - {of(c.RANKS_REPORTING)}) and on (experiment, run) ({active}))"
    recent = f"count(time() - {of(c.LAST_BUILD_UP)} < 3600)"
    opened = f"sum({of(c.OPEN_INCIDENTS)})"
    runs = Panel(
        title="Runs",
        description="Active and recently ended runs. The seconds since the last step show which runs are stalled.",
        kind="table",
        queries=(
            Query(expr=of(c.STEP), instant=True),
            Query(expr=of(c.GLOBAL_GRADIENT_NORM), instant=True),
            Query(expr=of(c.LOSS), instant=True, may_be_empty=True),
            Query(expr=f"time() - {of(c.LAST_STEP)}", instant=True),
            Query(expr=of(c.RANKS_REPORTING), instant=True),
        ),
        width=24,
        columns={
            "experiment": "experiment",
            "run": "run",
            "Value #A": "step",
            "Value #B": "global norm",
            "Value #C": "loss",
            "Value #D": "seconds since last step",
            "Value #E": "ranks",
        },
        links=(("Run dashboard", _RUN_LINK), ("Run page", _PAGE_LINK)),
    )
    rows = [
        [
            stat("Active runs", f"sum({of(c.RUN_ACTIVE)})", "Runs with at least one active rank."),
            stat("Open incidents", f"{opened} or vector(0)", "Ongoing failures, faults and deaths.", red=1),
            stat("Runs building up, 1 h", f"{recent} or vector(0)", "Runs whose norm climbed recently.", orange=1),
            stat("Ranks missing", f"{missing} or vector(0)", "Ranks of active runs that do not report.", orange=1),
        ],
        [_INCIDENTS, ALERTS],
        [runs],
        [_NORM, _LOSS],
        [
            rate("Steps per second", c.STEPS, "Optimizer steps received by the collector.", unit="ops"),
            increase("Non-finite steps", c.NONFINITE_STEPS, "Per run and interval."),
        ],
    ]
    title, text = "Foreshock: fleet", "All runs: which fail, which are about to, which have stalled."
    return dashboard("foreshock-fleet", title, text, variables(one_run=False), rows)


def run() -> Json:
    """One run."""
    quantile = f"histogram_quantile(0.99, sum by (le) (rate({of(c.GRADIENT_NORM, suffix='_bucket')}[{RATE}])))"
    norm = Panel(
        title="Global gradient norm",
        description=f"{_NORM.description} The 99th percentile shows what happened between two scrapes.",
        kind="timeseries",
        queries=(
            Query(expr=of(c.GLOBAL_GRADIENT_NORM), legend="newest step"),
            Query(expr=quantile, legend="99th percentile of all steps", may_be_empty=True),
            Query(expr=f"max(topk(1, {of(c.LOCAL_GRADIENT_NORM)}))", legend="largest local norm", may_be_empty=True),
        ),
        logarithmic=True,
    )
    events = Panel(
        title="Spikes and build-ups",
        description="Single spikes are mostly harmless. A build-up is a warning: see its runbook.",
        kind="timeseries",
        queries=tuple(
            Query(expr=f"increase({of(series)}[{RATE}])", legend=legend)
            for series, legend in (
                (c.GRADIENT_SPIKES, "spikes"),
                (c.GRADIENT_BUILD_UPS, "build-ups"),
                (c.LOSS_SPIKES, "loss spikes"),
            )
        ),
    )
    done = tuple(
        (f"rate({of(series)}[{RATE}]) / rate({of(c.STEPS)}[{RATE}])", what)
        for series, what in (
            (c.CLIPPED_STEPS, "clipped"),
            (c.SKIPPED_STEPS, "skipped"),
            (c.ABANDONED_STEPS, "left out by the script"),
            (c.SHADOW_CLIPPED_STEPS, "dry run: clipped"),
            (c.SHADOW_SKIPPED_STEPS, "dry run: skipped"),
        )
    )
    durations = of(c.STEP_DURATION, suffix="_bucket")
    rows = [
        [
            stat(
                "Running",
                of(c.RUN_ACTIVE),
                "Whether any rank is active.",
                states={"0": ("ended", "text"), "1": ("active", "green")},
            ),
            stat("Step", of(c.STEP), "The newest step. Prometheus has no step axis; the run page does."),
            stat(
                "Since the last step",
                f"time() - {of(c.LAST_STEP)}",
                "Ten minutes without a step is a stall.",
                unit="s",
                orange=600,
            ),
            stat(
                "Ranks missing",
                f"{of(c.RANKS_EXPECTED)} - {of(c.RANKS_REPORTING)}",
                "Ranks that do not report.",
                red=1,
            ),
        ],
        [_INCIDENTS, ALERTS],
        [norm, _LOSS],
        [
            events,
            increase(
                "Non-finite steps", c.NONFINITE_STEPS, "NaN and Inf in the loss and the gradient.", by="source, kind"
            ),
        ],
        [
            gauge("Clip coefficient", c.CLIP_COEFFICIENT, "1 means not clipped.", unit="percentunit", width=8),
            shares("Steps clipped and skipped", *done),
            gauge("Learning rate", c.LEARNING_RATE, "If the run explodes while this rises, warm up longer.", width=8),
        ],
        [
            gauge("Step", c.STEP, "A flat line means that the run has stalled.", width=8),
            Panel(
                title="Duration of a step",
                description=f"{c.STEP_DURATION.help} Slow steps are often a slow rank, or the data.",
                kind="timeseries",
                queries=tuple(
                    Query(
                        expr=f"histogram_quantile({q}, sum by (le) (rate({durations}[{RATE}])))",
                        legend=legend,
                        may_be_empty=True,
                    )
                    for q, legend in ((0.5, "median"), (0.99, "99th percentile"))
                ),
                unit="s",
                width=8,
            ),
            gauge("Loss scale", c.LOSS_SCALE, "A scale that keeps halving has collapsed.", width=8),
        ],
        [
            gauge(
                "Largest element of the gradient",
                c.GRADIENT_ABSOLUTE_MAXIMUM,
                "Multiplied by the loss scale, this must stay below 65,504, the float16 maximum.",
                logarithmic=True,
                width=8,
            ),
            gauge("Norm of the weights", c.PARAMETER_NORM, "If this keeps growing, use weight decay.", width=8),
            gauge(
                "Update of the weights per step, relative to their norm",
                c.UPDATE_RATIO,
                "About a thousandth is usual. Far more suggests that the learning rate is too high, far less too low.",
                logarithmic=True,
                width=8,
            ),
        ],
        [
            Panel(
                title="Gradient and the optimizer's moments",
                description="Adam scales its updates by the second moment. A gradient that jumps far above it makes "
                "updates of the largest size; a first moment near it means that gradients agree from step to step.",
                kind="timeseries",
                queries=(
                    Query(expr=of(c.GLOBAL_GRADIENT_NORM), legend="gradient"),
                    Query(expr=of(c.FIRST_MOMENT_NORM), legend="first moment"),
                    Query(expr=of(c.SECOND_MOMENT_NORM), legend="root of the second moment"),
                ),
                logarithmic=True,
                width=24,
            ),
        ],
    ]
    title, text = "Foreshock: run", "One run: whether it is about to die, and since when."
    return dashboard("foreshock-run", title, text, variables(one_run=True), rows)


def ranks() -> Json:
    """The ranks of one run."""
    norms = of(c.LOCAL_GRADIENT_NORM)
    median = f"quantile by (experiment, run) (0.5, {norms})"
    ratio = f"{norms} / on (experiment, run) group_left () {median}"
    rows = [
        [
            Panel(
                title="Local norm of each rank, as a multiple of the median",
                description="Before the all-reduce. A row that differs from all others is a rank with different data "
                "or a bad device.",
                kind="status-history",
                queries=(Query(expr=ratio, legend="rank {{rank}}"),),
                width=24,
                height=12,
                thresholds=((1.5, "yellow"), (3, "orange"), (10, "red")),
            )
        ],
        [
            Panel(
                title="Ranks with the largest norms",
                description="The five largest local norms.",
                kind="timeseries",
                queries=(Query(expr=f"topk(5, {norms})", legend="rank {{rank}}"),),
                logarithmic=True,
            ),
            Panel(
                title="Largest local norm over the median",
                description="1 means that all ranks agree. Above 3, find the rank that stands out.",
                kind="timeseries",
                queries=(Query(expr=f"max by (experiment, run) ({norms}) / {median}", legend="{{run}}"),),
                thresholds=((3, "orange"),),
            ),
        ],
        [
            Panel(
                title="Seconds since each rank's last report",
                description="Ranks report about every second, with or without steps. After a minute, a rank is silent.",
                kind="timeseries",
                queries=(
                    Query(expr=f"topk(5, time() - {of(c.LAST_REPORT)})", legend="rank {{rank}}", may_be_empty=True),
                ),
                unit="s",
            ),
            Panel(
                title="Ranks",
                description="Expected and reporting ranks.",
                kind="timeseries",
                queries=(
                    Query(expr=of(c.RANKS_EXPECTED), legend="expected"),
                    Query(expr=of(c.RANKS_REPORTING), legend="reporting"),
                ),
            ),
        ],
        [
            gauge(
                "Agreement of the ranks",
                c.RANK_AGREEMENT,
                "If this is always 1 on real data, check for a missing DistributedSampler.",
                queries=(Query(expr=of(c.RANK_AGREEMENT), legend="{{run}}", may_be_empty=True),),
            ),
            gauge(
                "Gradient noise scale, in batches of one rank",
                c.NOISE_SCALE,
                "It grows as training progresses.",
                queries=(Query(expr=of(c.NOISE_SCALE), legend="{{run}}", may_be_empty=True),),
                logarithmic=True,
            ),
        ],
    ]
    title, text = "Foreshock: ranks", "Which rank differs from the others, and which has fallen silent."
    return dashboard("foreshock-ranks", title, text, variables(one_run=True), rows)


def layers() -> Json:
    """The layers of one run."""
    norms = of(c.LAYER_GRADIENT_NORM)
    growth = f"{norms} / avg_over_time({norms}[30m])"
    by_run = "by (experiment, run)"

    def of_layers(title: str, block: str) -> Panel:
        series = c.LAYER_WEIGHTS[block]
        query = Query(expr=of(series), legend="{{layer}}")
        return Panel(title=title, description=series.help, kind="timeseries", queries=(query,), logarithmic=True)

    rows = [
        [
            Panel(
                title="Norm of each layer, relative to its mean over half an hour",
                description="The 16 layers with the largest norms. A row that lights up before the others is where "
                "an explosion began; all at once is a learning rate, or the data.",
                kind="status-history",
                queries=(Query(expr=growth, legend="{{layer}}"),),
                width=24,
                height=12,
                thresholds=((3, "yellow"), (10, "orange"), (100, "red")),
            )
        ],
        [
            Panel(
                title="Norm of each layer",
                description=c.LAYER_GRADIENT_NORM.help,
                kind="timeseries",
                queries=(Query(expr=norms, legend="{{layer}}"),),
                logarithmic=True,
            ),
            Panel(
                title="Layers that grow most",
                description="The five layers whose norm grew most, relative to its mean over half an hour.",
                kind="timeseries",
                queries=(Query(expr=f"topk(5, {growth})", legend="{{layer}}"),),
                logarithmic=True,
                thresholds=((10, "orange"),),
            ),
        ],
        [
            of_layers("Update of each layer, relative to its weights", "update_layer_ratios"),
            of_layers("Norm of each layer's weights", "parameter_layer_norms"),
        ],
        [
            of_layers("First moment of each layer", "first_moment_layer_norms"),
            of_layers("Root of each layer's second moment", "second_moment_layer_norms"),
        ],
        [
            _INCIDENTS,
            Panel(
                title="Smallest layer norm over the largest",
                description="If this falls toward 1e-5, some layers learn nothing: vanishing gradients.",
                kind="timeseries",
                queries=(Query(expr=f"min {by_run} ({norms}) / max {by_run} ({norms})", legend="{{run}}"),),
                logarithmic=True,
                width=8,
            ),
        ],
    ]
    title, text = "Foreshock: layers", "Which layer grows, and since when; which layers learn nothing."
    return dashboard("foreshock-layers", title, text, variables(one_run=True), rows)


DASHBOARDS = {"fleet": fleet, "run": run, "ranks": ranks, "layers": layers, "collector": collector}
"""By file name."""
