"""Incidents of a run: one per failure however many ranks, opened, kept up to date, closed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.totals import Totals

INCIDENTS_KEPT = 200
"""Newest incidents of a run in memory; the store has them all."""
FAILURE = "failure"
"""Key of the incident of a step that was not finite."""
DEATH = "death"
"""Key of the incident of ranks that left abnormally."""
SILENCE = "silence"
"""Key of the incident of a run that no longer reports. The key of any other incident is its cause."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Describes one failure of a run: when it was seen, how long it lasted, and the verdict on it."""

    number: int
    """From 1, within the run."""
    attempt: int
    sequence: int
    """Sequence number of the step at which it was seen."""
    opened_seconds: float
    """Unix time."""
    updated_seconds: float
    """Unix time of its last change, closing aside."""
    closed_seconds: float | None = None
    """Unix time; None while it is open."""
    bad_steps: int = 1
    last_bad_step: int
    verdict: Verdict


class Incidents:
    """Keeps the newest incidents of a run, and remembers what of them the next commit has to store."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self.kept: deque[Incident] = deque(maxlen=INCIDENTS_KEPT)
        """In the order in which they were opened."""
        self.unsaved: dict[int, Incident] = {}
        """By number."""
        self.unsaved_windows: dict[int, Window] = {}
        """Records before an incident, by its number."""

    @property
    def newest(self) -> Incident | None:
        """The incident that was opened last."""
        return self.kept[-1] if self.kept else None

    def restore(self, incidents: Iterable[Incident]) -> None:
        """Put stored incidents back, oldest first."""
        self.kept.extend(incidents)

    def open_by_verdict(self) -> Counter[str]:
        """How many are open, by cause."""
        return Counter(each.verdict.cause for each in self.kept if each.closed_seconds is None)

    def newest_by_alert(self) -> dict[str, Incident]:
        """The newest incident that each alert is about."""
        return {VERDICT_TABLE[each.verdict.cause].outcome.alert: each for each in self.kept}

    def open(self, attempt: Attempt, key: str, verdict: Verdict, sequence: int, now: float) -> int:
        """Open an incident, seen at this step, and return its number. One of a key may be open at a time."""
        assert key not in attempt.incidents
        incident = Incident(
            number=1 + sum(self._totals.incidents.values()),
            attempt=attempt.number,
            sequence=sequence,
            opened_seconds=now,
            updated_seconds=now,
            last_bad_step=verdict.first_bad_step,
            verdict=verdict,
        )
        attempt.incidents[key] = incident.number
        self.kept.append(incident)
        self.unsaved[incident.number] = incident
        self._totals.add_incident(verdict.cause, now, superseded=attempt.superseded)
        return incident.number

    def add_window(self, number: int, window: Window) -> None:
        """Have the records before an incident stored with it, unless it is too old to be kept in memory."""
        incident = self._numbered(number)
        if incident is not None:
            self.unsaved[number], self.unsaved_windows[number] = incident, window

    def extend(self, attempt: Attempt, key: str, step: int, now: float) -> None:
        """Count one more bad step."""
        if (incident := self._find(attempt, key)) is not None:
            self._put(replace(incident, updated_seconds=now, bad_steps=incident.bad_steps + 1, last_bad_step=step))

    def reevaluate(self, attempt: Attempt, key: str, verdict: Verdict, now: float) -> None:
        """Replace the verdict if it differs now that more is known. A changed cause is counted as a new one."""
        incident = self._find(attempt, key)
        if incident is None or incident.verdict == verdict:
            return
        before = incident.verdict.cause
        if before != verdict.cause:
            others = (i.opened_seconds for i in self.kept if i is not incident and i.verdict.cause == before)
            seen = max(others, default=0.0)
            self._totals.rename_incident(before, verdict.cause, now, seen=seen, superseded=attempt.superseded)
        self._put(replace(incident, updated_seconds=now, verdict=verdict))

    def add_evidence(self, attempt: Attempt, key: str, line: str, now: float) -> None:
        """Add a line of evidence to the verdict."""
        if (incident := self._find(attempt, key)) is not None:
            verdict = replace(incident.verdict, evidence=(*incident.verdict.evidence, line))
            self._put(replace(incident, updated_seconds=now, verdict=verdict))

    def close(self, attempt: Attempt, key: str, now: float) -> None:
        """Close the incident of this key, if one is open."""
        if (incident := self._find(attempt, key)) is not None:
            self._put(replace(incident, closed_seconds=now))
        attempt.incidents.pop(key, None)

    def close_all(self, attempt: Attempt, now: float, *, keep_open: tuple[str, ...] = ()) -> None:
        """Close the attempt's incidents except those with these keys."""
        for key in [key for key in attempt.incidents if key not in keep_open]:
            self.close(attempt, key, now)

    def mark_stored(self) -> None:
        """Note that every change is committed."""
        self.unsaved, self.unsaved_windows = {}, {}

    def _find(self, attempt: Attempt, key: str) -> Incident | None:
        number = attempt.incidents.get(key)
        return None if number is None else self._numbered(number)

    def _numbered(self, number: int) -> Incident | None:
        return next((incident for incident in self.kept if incident.number == number), None)

    def _put(self, incident: Incident) -> None:
        """Replace the incident of the same number."""
        place = next(i for i, each in enumerate(self.kept) if each.number == incident.number)
        self.kept[place] = self.unsaved[incident.number] = incident
