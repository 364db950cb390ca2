"""Incidents of a run: one per failure however many ranks, opened, kept up to date, closed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from foreshock_collector.analysis.verdicts import EXPECTED, Verdict
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.totals import Totals

INCIDENTS_KEPT = 200
"""Of a run, at hand; the store has them all."""
FAILURE = "failure"
"""What the incident of a step that was not finite is open under..."""
DEATH, SILENCE = "death", "silence"
"""... of ranks that left as they should not, and of a run that nobody hears of; any other under its cause."""


class Incidents:
    """Those of one run, newest last. Each change is told to `changed`, for the next commit."""

    def __init__(self, totals: Totals, changed: Callable[[dict[str, Any]], None]) -> None:
        self._totals = totals
        self._changed = changed
        self.kept: deque[dict[str, Any]] = deque(maxlen=INCIDENTS_KEPT)

    @property
    def newest(self) -> dict[str, Any] | None:
        """The one that was opened last."""
        return self.kept[-1] if self.kept else None

    def open_by_verdict(self) -> Counter[str]:
        """How many are not over."""
        return Counter(each["verdict"]["cause"] for each in self.kept if each["closed_seconds"] is None)

    def newest_by_alert(self) -> dict[str, dict[str, Any]]:
        """The one that each alert is about."""
        return {EXPECTED[each["verdict"]["cause"]].alert: each for each in self.kept}

    def open(self, attempt: Attempt, key: str, verdict: Verdict, sequence: int, now: float) -> int:
        """A new one, seen at the step of this sequence number; its own number. One of a key may be open at a time."""
        assert key not in attempt.incidents
        number = 1 + sum(self._totals.incidents.values())
        incident = {
            "id": number,
            "attempt": attempt.number,
            "sequence": sequence,
            "opened_seconds": now,
            "updated_seconds": now,
            "closed_seconds": None,
            "bad_steps": 1,
            "last_bad_step": verdict.first_bad_step,
            "verdict": verdict.as_json(),
        }
        attempt.incidents[key] = number
        self.kept.append(incident)
        self._totals.add_incident(verdict.cause, now, past=attempt.past)
        self._changed(incident)
        return number

    def extend(self, attempt: Attempt, key: str, step: int, now: float) -> None:
        """One more step was as bad."""
        if (incident := self._find(attempt, key)) is not None:
            incident |= {"updated_seconds": now, "bad_steps": incident["bad_steps"] + 1, "last_bad_step": step}
            self._changed(incident)

    def reevaluate(self, attempt: Attempt, key: str, verdict: Verdict, now: float) -> None:
        """More is known by now than when it was opened. A verdict that changes counts once more, as the new one."""
        if (incident := self._find(attempt, key)) is not None and incident["verdict"] != verdict.as_json():
            if (before := incident["verdict"]["cause"]) != verdict.cause:
                others = (
                    i["opened_seconds"] for i in self.kept if i is not incident and i["verdict"]["cause"] == before
                )
                seen = max(others, default=0.0)
                self._totals.rename_incident(before, verdict.cause, now, seen=seen, past=attempt.past)
            incident |= {"updated_seconds": now, "verdict": verdict.as_json()}
            self._changed(incident)

    def add_evidence(self, attempt: Attempt, key: str, line: str, now: float) -> None:
        """Something more was seen."""
        if (incident := self._find(attempt, key)) is not None:
            evidence = [*incident["verdict"]["evidence"], line]
            incident |= {"updated_seconds": now, "verdict": {**incident["verdict"], "evidence": evidence}}
            self._changed(incident)

    def close(self, attempt: Attempt, key: str, now: float) -> None:
        """It is over, if it was open."""
        if (incident := self._find(attempt, key)) is not None:
            incident["closed_seconds"] = now
            self._changed(incident)
        attempt.incidents.pop(key, None)

    def close_all(self, attempt: Attempt, now: float, *, but: tuple[str, ...] = ()) -> None:
        """The attempt is over. but: these stay open."""
        for key in [key for key in attempt.incidents if key not in but]:
            self.close(attempt, key, now)

    def _find(self, attempt: Attempt, key: str) -> dict[str, Any] | None:
        number = attempt.incidents.get(key)
        return next((incident for incident in self.kept if incident["id"] == number), None)
