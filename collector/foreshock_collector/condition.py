"""How a run is, in one word: the worst that is true of it."""

from __future__ import annotations

from typing import Literal

from foreshock_collector.runs import Run

Condition = Literal["failing", "building up", "stalled", "ranks missing", "running", "failed", "ended"]


def condition(run: Run, now: float, silent: float) -> Condition:
    """Of the newest attempt. now: Unix time; silent: seconds without a word after which a run has ended."""
    attempt = run.newest
    if not run.active(now, silent):
        return "failed" if attempt.detector.failing else "ended"
    if attempt.detector.failing:
        return "failing"
    if attempt.detector.gradient.in_build_up:
        return "building up"
    last = max(run.totals.last["step"], attempt.started_seconds, run.watched_since)
    if now - last > run.totals.stall_after():
        return "stalled"
    if any(not instance.reporting for instance in attempt.instances.values()):
        return "ranks missing"
    return "running"
