"""The alerts of one run over time: pending, firing, notified, resolved, as in Prometheus and Alertmanager."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.alert import Alert
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.alerting.routing import GROUP_WAIT_SECONDS, NOTIFIED, is_inhibited
from foreshock_collector.alerting.texts import annotations_of, labels_of

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Notification:
    """Describes an alert on a run that has begun to fire, or that is resolved."""

    labels: dict[str, str]
    annotations: dict[str, str]
    started_seconds: float
    """Unix time at which the alert began to fire."""
    resolved_seconds: float | None
    """Unix time at which it was resolved; None while it fires."""


@dataclass(kw_only=True)
class _Track:
    """Keeps the state of an alert whose condition holds, or has held. Times but one are monotonic, in seconds."""

    held_since: float
    held_last: float
    fires_since: float | None = None
    started: float = 0.0
    """Unix time at which it began to fire."""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    notified: bool = False


class RunAlerts:
    """Evaluates the alerts of one run, again and again. addresses: those of the links."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._tracks: dict[str, _Track] = {}

    @property
    def quiet(self) -> bool:
        """Whether no alert is pending or fires."""
        return not self._tracks

    @property
    def firing(self) -> set[str]:
        """Names of the alerts that fire, notified or not."""
        return {name for name, track in self._tracks.items() if track.fires_since is not None}

    def update(self, facts: Facts | None, now: float, seconds: float) -> list[Notification]:
        """Return what has to be notified now. facts: None if the run is gone. now: Unix time; seconds: monotonic."""
        resolved = [found for alert in NOTIFIED if (found := self._advance(alert, facts, now, seconds)) is not None]
        firing = self.firing
        started = []
        for alert in NOTIFIED:
            track = self._tracks.get(alert.name)
            if track is None or track.fires_since is None or track.notified or is_inhibited(alert.name, firing):
                continue
            if seconds - track.fires_since >= GROUP_WAIT_SECONDS[alert.severity]:
                track.notified = True
                started.append(_notification(track, None))
        return started + resolved

    def _advance(self, alert: Alert, facts: Facts | None, now: float, seconds: float) -> Notification | None:
        """Move one alert on. Return its resolution, if it was notified and is resolved."""
        assert alert.condition.value is not None
        value = None if facts is None else alert.condition.value(facts)
        track = self._tracks.get(alert.name)
        if facts is not None and value is not None:
            if track is None:
                track = self._tracks[alert.name] = _Track(held_since=seconds, held_last=seconds)
            track.held_last = seconds
            if track.fires_since is None and seconds - track.held_since >= duration(alert.wait):
                track.fires_since, track.started = seconds, now
            # Its resolution repeats what was notified, so that a receiver takes both for one alert.
            if not track.notified:
                track.labels = labels_of(alert, facts)
                track.annotations = annotations_of(alert, facts, value, self._addresses)
        elif track is not None and (
            track.fires_since is None or seconds - track.held_last >= duration(alert.keep_firing_for)
        ):
            del self._tracks[alert.name]
            return _notification(track, now) if track.notified else None
        return None


def duration(text: str) -> float:
    """Return the seconds of a duration such as `30s` or `2m`; 0 for an empty one."""
    found = re.fullmatch(r"(\d+)([smh])", text or "0s")
    assert found is not None, text
    return int(found[1]) * _UNITS[found[2]]


def _notification(track: _Track, resolved: float | None) -> Notification:
    return Notification(
        labels=track.labels,
        annotations=track.annotations,
        started_seconds=track.started,
        resolved_seconds=resolved,
    )
