"""Runs, incidents and events as the API's JSON: the one place that names its keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.events import DetectedEvent, RunEvent
from foreshock_collector.state.incidents import Incident
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.summary import RunSummary

Answer = dict[str, Any]


def summary_answer(run: RunSummary) -> Answer:
    """A run and its newest attempt."""
    return {
        "run": run.run,
        "experiment": run.experiment,
        "state": "active" if run.active else "ended",
        "condition": run.condition,
        "attempt": run.attempt,
        "started_seconds": run.started_seconds,
        "world_size": run.world_size,
        "ranks_reporting": run.ranks_reporting,
        "verdict": run.verdict,
        "verdict_title": VERDICT_TABLE[run.verdict].title,
        "failing": run.failing,
        "building_up": run.building_up,
        "newest": run.newest,
        "last_report_seconds": run.last_report,
        "last_step_seconds": run.last_step,
        "stall_threshold_seconds": run.stall_threshold,
        "errors": run.errors,
    }


def verdict_answer(verdict: Verdict) -> Answer:
    """Return a verdict, and what the table says about its cause."""
    values = asdict(verdict)
    values["try"] = values.pop("try_")
    entry = VERDICT_TABLE[verdict.cause]
    return values | {
        "title": entry.title,
        "finite": entry.outcome.finite,
        "names_last_step": entry.outcome.names_last_step,
        "runbook": entry.outcome.alert,
    }


def incident_answer(incident: Incident) -> Answer:
    """An incident with its verdict."""
    return {
        "id": incident.number,
        "attempt": incident.attempt,
        "sequence": incident.sequence,
        "opened_seconds": incident.opened_seconds,
        "updated_seconds": incident.updated_seconds,
        "closed_seconds": incident.closed_seconds,
        "bad_steps": incident.bad_steps,
        "last_bad_step": incident.last_bad_step,
        "verdict": verdict_answer(incident.verdict),
    }


def event_answer(event: RunEvent) -> Answer:
    """An event; `rank` and `detail` of one that a recorder reported, `score` of one that the detector found."""
    if isinstance(event, DetectedEvent):
        return {**asdict(event.event), "seen_seconds": event.seen_seconds}
    return asdict(event)


def attempt_answer(attempt: Attempt) -> Answer:
    """An attempt of a run."""
    return {
        "attempt": attempt.number,
        "launch": attempt.launch,
        "started_seconds": attempt.started_seconds,
        "world_size": attempt.world_size,
        "steps": attempt.finalized,
        "over": attempt.over,
        "incident": max(attempt.incidents.values(), default=None),
    }


def rank_answer(instance: Instance) -> Answer:
    """A rank of an attempt."""
    return {
        "rank": instance.rank,
        "node": instance.node,
        "pid": instance.pid,
        "instance": instance.name,
        "state": instance.status,
        "detail": instance.detail,
        "last_report_seconds": instance.last_report,
        "stored": instance.stored,
        "last_step": instance.last_step,
        "last_complete": instance.last_finished,
        "local_norm": None if instance.local_nonfinite else instance.local_norm,
        "local_norm_nonfinite": instance.local_nonfinite,
        "loss": instance.loss,
        "dropped": instance.dropped,
    }
