"""The condition of a run: the worst that applies."""

from __future__ import annotations

from foreshock_collector.analysis.verdict_entry import Condition
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.incidents import DEATH
from foreshock_collector.state.runs import Run


def condition(run: Run, now: float, silent: float) -> Condition:
    """The condition of the newest attempt. now: Unix time; silent: seconds without a report that end a run."""
    attempt = run.newest
    if not run.active(now, silent):
        return condition_at_end(attempt)
    if DEATH in attempt.incidents:
        return "failed"
    if attempt.detector.failing:
        return "failing"
    if attempt.detector.gradient.in_build_up:
        return "building up"
    if "stalled" in attempt.incidents:
        return "stalled"
    if any(not instance.reporting for instance in attempt.instances.values()):
        return "ranks missing"
    return "running"


def condition_at_end(attempt: Attempt) -> Condition:
    """The condition of a run whose newest attempt this is, and that has ended."""
    if attempt.detector.failing:
        return "failed"
    if attempt.outcome:
        return attempt.outcome
    reasons = {instance.closed for instance in attempt.instances.values()}
    if reasons & {"EXCEPTION", "LOST", ""}:
        return "failed"  # one that never left has fallen silent
    return "interrupted" if "INTERRUPTED" in reasons else "ended"
