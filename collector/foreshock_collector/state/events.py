"""The events of a run: what the detector found in its steps, and what recorders reported of its ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from foreshock_collector.analysis.detection import Event

EVENTS_KEPT = 200
"""Newest events of a run in memory; the store has them all."""


@dataclass(frozen=True, kw_only=True)
class DetectedEvent:
    """Records an event that the detector found in a step."""

    event: Event
    seen_seconds: float
    """Unix time."""

    @property
    def kind(self) -> str:
        """What the detector calls it."""
        return self.event.kind


@dataclass(frozen=True, kw_only=True)
class RankEvent:
    """Records an event that a recorder reported of a rank."""

    kind: str
    """Name of the protocol's kind, in lower case: "rank_lost", "probe_error"."""
    attempt: int
    step: int
    rank: int
    instance: str
    detail: str
    seen_seconds: float
    """Unix time."""


RunEvent = DetectedEvent | RankEvent


class Events:
    """Keeps the newest events of a run, and remembers those that the next commit has to store."""

    def __init__(self) -> None:
        self.kept: deque[RunEvent] = deque(maxlen=EVENTS_KEPT)
        """In the order in which they were seen."""
        self.unsaved: list[RunEvent] = []

    @property
    def newest(self) -> RunEvent | None:
        """The event that was seen last."""
        return self.kept[-1] if self.kept else None

    def add(self, event: RunEvent) -> None:
        """Record a new event."""
        self.kept.append(event)
        self.unsaved.append(event)

    def restore(self, events: Iterable[RunEvent]) -> None:
        """Put stored events back, oldest first."""
        self.kept.extend(events)

    def mark_stored(self) -> None:
        """Note that every event is committed."""
        self.unsaved = []

    def detected(self, attempt: int, *, upto: int) -> list[Event]:
        """What the detector found in an attempt, up to this sequence number."""
        found = (each.event for each in self.kept if isinstance(each, DetectedEvent))
        return [event for event in found if event.attempt == attempt and event.sequence <= upto]
