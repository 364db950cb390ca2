"""Alerts on what the collector has diagnosed, one for each group of verdicts, and on skipped steps.

None of them asks whether the run is still active: a job that has failed is often gone within a second.
"""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, Alert
from foreshock_collector.alerting.condition import Condition, by_run, recent, still_open
from foreshock_collector.alerting.lookups import (
    Lookup,
    incident_label,
    incident_sentence,
    known_label,
    number,
)
from foreshock_collector.analysis.verdict_table import VERDICT_TABLE


def _skipped_share(window: str) -> str:
    skipped, steps = (
        f"max by (experiment, run) (increase({series.name}[{window}]))" for series in (c.SKIPPED_STEPS, c.STEPS)
    )
    return f"(\n  {skipped}\n  / {steps}\n) > 0.05"


def _verdict_alert(
    name: str,
    *,
    keep_firing_for: str,
    summary: str,
    description: tuple[str | Lookup, ...],
    labels: tuple[str, ...],
    include_closed: bool = True,
) -> Alert:
    """Build the alert that fires while an incident is open whose verdict names it.

    labels: annotations for programs, beside the verdict and its first step. include_closed: fire for five minutes even
    if the incident is closed by then.
    """
    causes = tuple(cause for cause, entry in VERDICT_TABLE.items() if entry.outcome.alert == name)
    (severity,) = {VERDICT_TABLE[cause].outcome.severity for cause in causes}
    assert severity is not None
    open_ = still_open(causes)
    known = {
        "verdict": incident_label(name, "verdict"),
        "since_step": incident_label(name, "first_step"),
        "lead_steps": incident_label(name, "lead_steps"),
        "worst_rank": known_label(name, "rank"),
        "layer": known_label(name, "layer"),
    }
    return Alert(
        name=name,
        severity=severity,
        condition=recent(c.LAST_INCIDENT, causes) | open_ if include_closed else open_,
        keep_firing_for=keep_firing_for,
        summary=summary,
        description=description,
        values={key: known[key] for key in ("verdict", "since_step", *labels)},
    )


_WHERE = "Worst rank {rank}, layer {layer}."

# The first two keep firing longer than any early sign: Alertmanager inhibits the signs of the same run meanwhile, and
# would send them late if they outlasted the failure.
FAILURES = (
    _verdict_alert(
        "ForeshockExplodingGradients",
        keep_firing_for="10m",
        summary="Gradients grew until they were no longer finite.",
        description=(
            f"Run {RUN} has exploded.",
            incident_sentence(
                "ForeshockExplodingGradients",
                f"First non-finite step {{first_step}}, {{lead}} after the first sign. {_WHERE}",
            ),
            "Go back to a checkpoint from before the first sign.",
        ),
        labels=("lead_steps", "worst_rank", "layer"),
    ),
    _verdict_alert(
        "ForeshockSuddenNonFinite",
        keep_firing_for="10m",
        summary="The loss or the gradient became NaN or Inf without a preceding gradient build-up.",
        description=(
            f"Run {RUN} is no longer finite.",
            incident_sentence(
                "ForeshockSuddenNonFinite", f"First non-finite step {{first_step}}{{first_of_all}}. {_WHERE}"
            ),
            incident_label("ForeshockSuddenNonFinite", "summary"),
        ),
        labels=("lead_steps", "worst_rank", "layer"),
    ),
    _verdict_alert(
        "ForeshockTrainingFault",
        keep_firing_for="5m",
        summary="Training is degraded although all values are finite.",
        description=(
            f"Run {RUN} has a persistent fault.",
            incident_label("ForeshockTrainingFault", "summary"),
            "The run's page shows the evidence and what to try.",
        ),
        labels=("worst_rank", "layer"),
    ),
    Alert(
        name="ForeshockStepsSkipped",
        severity="warning",
        # Both windows, so that neither a short burst nor an old one fires; the first 400 steps, in which a GradScaler
        # finds its scale, do not count.
        condition=Condition(
            promql=f"{_skipped_share('5m')}\nand on (experiment, run)\n{_skipped_share('1h')}\n"
            f"and on (experiment, run) {by_run(c.STEPS)} > 400"
        ),
        wait="2m",
        summary="The optimizer skips more than one step in twenty.",
        description=(
            f"Run {RUN} skipped {{{{ $value | humanizePercentage }}}} of its steps in the last five minutes.",
            number(c.LOSS_SCALE, "%.3g", "Loss scale {}."),
        ),
        values=NEWEST_STEP,
    ),
    _verdict_alert(
        "ForeshockRunDied",
        keep_firing_for="1m",
        summary="A run has lost ranks: they crashed, were killed, or stopped reporting.",
        description=(
            f"Run {RUN} has lost ranks.",
            incident_label("ForeshockRunDied", "summary"),
            "This alert resolves once the run makes steps again.",
            "It also resolves when the run's series expire some time after its end, even if nothing was fixed.",
        ),
        labels=("worst_rank",),
        include_closed=False,
    ),
    # The collector decides what a stall is, from the run's own pace: foreshock_stall_threshold_seconds.
    _verdict_alert(
        "ForeshockRunStalled",
        keep_firing_for="1m",
        summary="A running job has stopped making steps.",
        description=(
            f"Run {RUN} has stalled.",
            incident_label("ForeshockRunStalled", "summary"),
            "The run's page shows its newest step and the state of each rank.",
        ),
        labels=("worst_rank",),
        include_closed=False,
    ),
)
