"""A run as a list of runs shows it: so little that it can be kept of every run."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock_collector.analysis.verdict_table import Cause
from foreshock_collector.state.condition import condition, condition_at_end
from foreshock_collector.state.runs import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """Describes a run and its newest attempt; of an ended run that is in the store alone, all that is in memory."""

    run: str
    """Name of the run."""
    experiment: str
    active: bool
    condition: str
    """As `condition` returns it, or "unknown"."""
    attempt: int
    """Number of the newest attempt; the same holds for all that follows, up to `building_up`."""
    started_seconds: float
    """Unix time."""
    world_size: int
    ranks_reporting: int
    """Ranks that run, or left cleanly."""
    failing: bool
    building_up: bool
    verdict: Cause
    """Cause of the newest incident, of any attempt; "healthy" without one."""
    newest: dict[str, float | str | None]
    """As `Totals.newest` returns it; empty before the first step."""
    steps: int
    """How many steps all its attempts have made, abandoned ones included."""
    last_report: float
    """Unix time at which any of its ranks last reported."""
    last_step: float
    """Unix time at which the last step was counted; 0 before the first."""
    stall_threshold: float
    """Seconds without a step that mean a stall."""
    errors: dict[str, int]
    """Internal errors, by stage."""


def summary_of(run: Run, now: float, silent: float) -> RunSummary:
    """Return the summary of a run. now: Unix time; silent: seconds without a report that end a run."""
    return _summary(run, condition(run, now, silent), active=run.active(now, silent))


def summary_at_end(run: Run) -> RunSummary:
    """Return the summary of a run that is over: it stays what it is."""
    return _summary(run, condition_at_end(run.newest), active=False)


def _summary(run: Run, condition_: str, *, active: bool) -> RunSummary:
    attempt, incident = run.newest, run.incidents.newest
    return RunSummary(
        run=run.name,
        experiment=run.experiment,
        active=active,
        condition=condition_,
        attempt=attempt.number,
        started_seconds=attempt.started_seconds,
        world_size=attempt.world_size,
        ranks_reporting=sum(instance.reporting for instance in attempt.instances.values()),
        failing=attempt.detector.failing,
        building_up=attempt.detector.gradient.in_build_up,
        verdict=incident.verdict.cause if incident else "healthy",
        newest=run.totals.newest() if attempt.finalized else {},
        steps=run.totals.steps,
        last_report=run.last_report(),
        last_step=run.totals.last["step"],
        stall_threshold=run.stall_threshold(),
        errors=run.errors.nonzero(),
    )
