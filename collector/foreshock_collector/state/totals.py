"""A run in numbers: what its steps add up to, and its newest values. Exposition shows it, the store keeps it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from foreshock_collector.catalogue import DROP_REASONS, GRADIENT_NORM, INCIDENT_VERDICTS, STEP_DURATION
from foreshock_collector.records.steps import Step

NONFINITE_KINDS = tuple((source, kind) for source in ("loss", "gradient") for kind in ("nan", "inf"))
COUNTED_STEPS = ("steps", "abandoned", "clipped", "skipped", "shadow_clipped", "shadow_skipped")
COUNTED_EVENTS = ("spike", "build_up", "loss_spike")
_STALL_STEPS, _STALL_LEAST_SECONDS, _STALL_MOST_SECONDS = 20, 120.0, 1800.0
_FIRST_STEPS, _FIRST_STEPS_SECONDS = 10, 600.0
"""The first steps of an attempt are given so long each: compilation, or the index of a large data set."""
_RECENT_DURATIONS = 64
"""Durations whose median is a run's pace."""


@dataclass
class Histogram:
    """Counts values by bucket; cumulative only when exposed."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, but for the last, which has none."""
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one finite value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        # Norms near the largest float must not make the sum infinite.
        self.total = min(self.total + value, 1e300)


@dataclass(kw_only=True, eq=False)
class Totals:
    """Adds up a run's steps, events and incidents. Counters only grow; times are Unix seconds, 0: never."""

    counters: dict[str, int] = field(default_factory=dict)
    """Steps and events, by kind."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Steps by what of them was not finite: "loss nan", "gradient inf"."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records that will never come, by reason."""
    incidents: dict[str, int] = field(default_factory=dict)
    """Incidents by cause; one whose cause has changed counts under both."""
    last_incident: dict[str, float] = field(default_factory=dict)
    """When the last incident of each cause was opened."""
    last: dict[str, float] = field(default_factory=dict)
    """When each kind of event was last seen."""
    event_steps: dict[str, int] = field(default_factory=dict)
    """Step of the last event of each kind; none before the first."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Newest finite value of each gauge, of the newest attempt."""
    bad: dict[str, str] = field(default_factory=dict)
    """"nan" or "inf" where the newest loss or gradient is not finite, though `gauges` keeps the last one that was."""
    norms: Histogram = field(default_factory=lambda: Histogram(GRADIENT_NORM.buckets))
    durations: Histogram = field(default_factory=lambda: Histogram(STEP_DURATION.buckets))
    recent_durations: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Each series exists at 0 from the start; of a run stored by an older version, also those that are new.
        self.counters = dict.fromkeys((*COUNTED_STEPS, *COUNTED_EVENTS), 0) | self.counters
        self.nonfinite = {f"{source} {kind}": 0 for source, kind in NONFINITE_KINDS} | self.nonfinite
        self.dropped = dict.fromkeys(DROP_REASONS, 0) | self.dropped
        self.incidents = dict.fromkeys(INCIDENT_VERDICTS, 0) | self.incidents
        self.last_incident = dict.fromkeys(INCIDENT_VERDICTS, 0.0) | self.last_incident
        self.last = dict.fromkeys((*COUNTED_EVENTS, "nonfinite", "step"), 0.0) | self.last
        self.bad = {"loss": "", "gradient": ""} | self.bad

    def add_step(self, step: Step, now: float, *, newest: bool) -> None:
        """Count one step. newest: whether it belongs to the newest attempt, whose values are the run's."""
        self.counters["steps" if step.stepped else "abandoned"] += 1
        self.counters["clipped"] += step.clip_coefficient < 1
        self.counters["skipped"] += step.skipped
        self.counters["shadow_clipped"] += step.shadow_clipped
        self.counters["shadow_skipped"] += step.shadow_skipped
        self.add_nonfinite(step.nonfinite, now)
        if math.isfinite(step.global_norm):
            self.norms.add(step.global_norm)
        if step.duration_seconds is not None and step.stepped:
            self.durations.add(step.duration_seconds)
            self.recent_durations = [*self.recent_durations[1 - _RECENT_DURATIONS :], step.duration_seconds]
        self.last["step"] = now
        if newest:
            gauges = {
                **step.measurements,
                "step": float(step.step),
                "global_norm": step.global_norm,
                "clip_coefficient": step.clip_coefficient,
                "learning_rate": step.learning_rate,
                "loss_scale": step.loss_scale,
                "loss": step.loss,
            }
            self.gauges |= {name: value for name, value in gauges.items() if value is not None and math.isfinite(value)}
            if step.stepped or not math.isnan(step.global_norm) or step.nan_gradient:
                self.bad["gradient"] = _kind(step.nan_gradient, step.inf_gradient)
            if step.loss is not None:
                self.bad["loss"] = _kind(step.nan_loss, step.inf_loss)

    def add_nonfinite(self, found: Sequence[tuple[str, str]], now: float) -> None:
        """Count what of a step is not finite: pairs of source and kind, as in `Step.nonfinite`."""
        for source, kind in found:
            self.nonfinite[f"{source} {kind}"] += 1
            self.last["nonfinite"] = now

    def newest(self) -> dict[str, float | str | None]:
        """The newest values as they are: None for a loss or norm that is not finite, and its kind beside it."""
        truth: dict[str, float | str | None] = dict(self.gauges)
        truth |= {f"{source}_nonfinite": kind for source, kind in self.bad.items()}
        truth |= {"loss": None} if self.bad["loss"] else {}
        return truth | ({"global_norm": None} if self.bad["gradient"] else {})

    def add_event(self, kind: str, step: int, now: float, *, superseded: bool) -> None:
        """Count what the detector found. superseded: whether its attempt is; then it is too late to alert anyone."""
        if kind in COUNTED_EVENTS:
            self.counters[kind] += 1
            if not superseded:
                self.last[kind] = now
                self.event_steps[kind] = step

    def add_incident(self, verdict: str, now: float, *, superseded: bool) -> None:
        """Count an incident. superseded: as in `add_event`."""
        self.incidents[verdict] += 1
        if not superseded:
            self.last_incident[verdict] = now

    def rename_incident(self, before: str, verdict: str, now: float, *, seen: float, superseded: bool) -> None:
        """Count an incident once more whose cause has changed. seen: when another of the old cause was opened last."""
        self.add_incident(verdict, now, superseded=superseded)
        self.last_incident[before] = seen

    @property
    def steps(self) -> int:
        """How many steps have been counted, abandoned ones included."""
        return self.counters["steps"] + self.counters["abandoned"]

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time that is known."""
        for times in (self.last, self.last_incident):
            times.update({name: each + seconds for name, each in times.items() if each})

    def limit_times(self, now: float) -> None:
        """Take each time after `now` for now."""
        for times in (self.last, self.last_incident):
            times.update({name: min(each, now) for name, each in times.items()})

    def add_dropped(self, counts: Counter[str]) -> None:
        """Count records that will never come, by reason."""
        self.dropped = {reason: count + counts[reason] for reason, count in self.dropped.items()}

    def stall_threshold(self, steps: int) -> float:
        """Seconds without a step that mean a stall, by the run's own pace. steps: how many the attempt has made."""
        usual = _STALL_STEPS * median(self.recent_durations) if self.recent_durations else 0.0
        least = _STALL_LEAST_SECONDS if steps >= _FIRST_STEPS else _FIRST_STEPS_SECONDS
        return min(max(usual, least), _STALL_MOST_SECONDS)


def _kind(nan: bool, inf: bool) -> str:
    return "nan" if nan else "inf" if inf else ""
