"""Alerts on signs that come before the damage."""

from __future__ import annotations

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.alert import NEWEST_STEP, RUN, WORST, Alert
from foreshock_collector.alerting.condition import recent
from foreshock_collector.alerting.lookups import largest, number

EARLY_SIGNS = (
    Alert(
        name="ForeshockGradientSpike",
        severity="info",
        condition=recent(c.LAST_SPIKE),
        keep_firing_for="2m",
        summary="The gradient norm was far above its recent history for one step.",
        description=(
            f"Run {RUN} had a gradient spike.",
            "Most single spikes are harmless; several in quick succession raise ForeshockGradientBuildUp.",
        ),
        values={"since_step": number(c.LAST_SPIKE_STEP), **NEWEST_STEP, **WORST},
    ),
    Alert(
        name="ForeshockGradientBuildUp",
        severity="warning",
        condition=recent(c.LAST_BUILD_UP),
        keep_firing_for="5m",
        summary="The gradient norm keeps climbing, as it does before gradients explode.",
        description=(
            f"Run {RUN} has a gradient build-up.",
            number(c.STEP, sentence="Newest step {}."),
            number(c.GLOBAL_GRADIENT_NORM, "%.3g", "Gradient norm {}."),
            number(c.LEARNING_RATE, "%.3g", "Learning rate {}."),
            largest(c.LOCAL_GRADIENT_NORM, "rank", "Largest local norm on rank {}."),
            "If the climb stops, this alert resolves within ten minutes.",
        ),
        values={"since_step": number(c.LAST_BUILD_UP_STEP), **NEWEST_STEP, **WORST},
    ),
    Alert(
        name="ForeshockLossSpike",
        severity="info",
        condition=recent(c.LAST_LOSS_SPIKE),
        keep_firing_for="2m",
        summary="The loss was far above its recent history for one step.",
        description=(
            f"Run {RUN} had a loss spike.",
            "A loss that recovers within a few dozen steps needs no action.",
        ),
        values={"since_step": number(c.LAST_LOSS_SPIKE_STEP), **NEWEST_STEP},
    ),
)
