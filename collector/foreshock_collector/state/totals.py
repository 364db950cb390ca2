"""A run in numbers: what its steps add up to, and its newest values. Exposition shows it, the store keeps it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from foreshock_collector.catalogue import DROP_REASONS, GRADIENT_NORM, INCIDENT_VERDICTS, STEP_DURATION
from foreshock_collector.records.steps import Step

NONFINITE_KINDS = tuple((source, kind) for source in ("loss", "gradient") for kind in ("nan", "inf"))
COUNTED_STEPS = ("steps", "abandoned", "clipped", "skipped", "shadow_clipped", "shadow_skipped")
COUNTED_EVENTS = ("spike", "build_up", "loss_spike")
_STALL_STEPS, _STALL_LEAST_SECONDS, _STALL_MOST_SECONDS = 20, 120.0, 1800.0
_FIRST_STEPS, _FIRST_STEPS_SECONDS = 10, 600.0
"""So many steps of an attempt are given so long each: compilation, or the index of a large data set."""
_SAVED = ("counters", "nonfinite", "dropped", "incidents", "last_incident", "last", "event_steps", "gauges", "bad")


@dataclass
class Histogram:
    """One count per bucket; cumulative only when shown."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one finite value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        # Norms near the largest float must not make the sum infinite.
        self.total = min(self.total + value, 1e300)


class Totals:
    """All of it. Counters only grow; times are Unix seconds, 0: never."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = dict.fromkeys((*COUNTED_STEPS, *COUNTED_EVENTS), 0)
        self.nonfinite: dict[str, int] = {f"{source} {kind}": 0 for source, kind in NONFINITE_KINDS}
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)
        self.incidents: dict[str, int] = dict.fromkeys(INCIDENT_VERDICTS, 0)
        self.last_incident: dict[str, float] = dict.fromkeys(INCIDENT_VERDICTS, 0.0)
        self.last: dict[str, float] = dict.fromkeys((*COUNTED_EVENTS, "nonfinite", "step"), 0.0)
        """When each kind of event was last seen."""
        self.event_steps: dict[str, int] = {}
        """Step of the last of each kind; none before the first."""
        self.gauges: dict[str, float] = {}
        """Newest finite value of each gauge, of the newest attempt."""
        self.bad: dict[str, str] = {"loss": "", "gradient": ""}
        """"nan" or "inf" where the newest value is not finite, though `gauges` keeps the last one that was."""
        self.norms = Histogram(GRADIENT_NORM.buckets)
        self.durations = Histogram(STEP_DURATION.buckets)
        self._recent: deque[float] = deque(maxlen=64)

    def add_step(self, step: Step, now: float, *, newest: bool) -> None:
        """Count one step. newest: its attempt is, so its values are the run's."""
        self.counters["steps" if step.stepped else "abandoned"] += 1
        self.counters["clipped"] += step.clip_coefficient < 1
        self.counters["skipped"] += step.skipped
        self.counters["shadow_clipped"] += step.shadow_clipped
        self.counters["shadow_skipped"] += step.shadow_skipped
        for source, kind in step.nonfinite:
            self.nonfinite[f"{source} {kind}"] += 1
            self.last["nonfinite"] = now
        if math.isfinite(step.global_norm):
            self.norms.add(step.global_norm)
        if step.duration_seconds is not None and step.stepped:
            self.durations.add(step.duration_seconds)
            self._recent.append(step.duration_seconds)
        self.last["step"] = now
        if newest:
            gauges = {
                "step": float(step.step),
                "global_norm": step.global_norm,
                "gradient_absolute_maximum": step.gradient_absolute_maximum,
                "clip_coefficient": step.clip_coefficient,
                "parameter_norm": step.parameter_norm,
                "update_ratio": step.update_ratio,
                "learning_rate": step.learning_rate,
                "loss_scale": step.loss_scale,
                "loss": step.loss,
            }
            self.gauges |= {name: value for name, value in gauges.items() if value is not None and math.isfinite(value)}
            if step.stepped or not math.isnan(step.global_norm) or step.nan_gradient:
                self.bad["gradient"] = _kind(step.nan_gradient, step.inf_gradient)
            if step.loss is not None:
                self.bad["loss"] = _kind(step.nan_loss, step.inf_loss)

    def newest(self) -> dict[str, float | str | None]:
        """The newest values as they are: None for a loss or norm that is not finite, and its kind beside it."""
        truth: dict[str, float | str | None] = dict(self.gauges)
        truth |= {f"{source}_nonfinite": kind for source, kind in self.bad.items()}
        truth |= {"loss": None} if self.bad["loss"] else {}
        return truth | ({"global_norm": None} if self.bad["gradient"] else {})

    def add_event(self, kind: str, step: int, now: float, *, past: bool) -> None:
        """Count what the detector has found. past: as `Attempt.past`; it is told too late to alert anybody."""
        if kind in COUNTED_EVENTS:
            self.counters[kind] += 1
            if not past:
                self.last[kind] = now
                self.event_steps[kind] = step

    def add_incident(self, verdict: str, now: float, *, past: bool) -> None:
        """Count an incident. past: as in `add_event`."""
        self.incidents[verdict] += 1
        if not past:
            self.last_incident[verdict] = now

    def rename_incident(self, before: str, verdict: str, now: float, *, seen: float, past: bool) -> None:
        """An incident has another verdict now, and counts once more. seen: when there was one of the old before it."""
        self.add_incident(verdict, now, past=past)
        self.last_incident[before] = seen

    def add_dropped(self, counts: Counter[str]) -> None:
        """Count records that will never come, by reason."""
        self.dropped = {reason: count + counts[reason] for reason, count in self.dropped.items()}

    def stall_after(self, steps: int) -> float:
        """Seconds without a step that mean a stall, by the run's own pace. steps: that the attempt has made."""
        usual = _STALL_STEPS * median(self._recent) if self._recent else 0.0
        least = _STALL_LEAST_SECONDS if steps >= _FIRST_STEPS else _FIRST_STEPS_SECONDS
        return min(max(usual, least), _STALL_MOST_SECONDS)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "norms": [self.norms.counts, self.norms.total],
            "durations": [self.durations.counts, self.durations.total],
            "recent": list(self._recent),
            **{name: getattr(self, name) for name in _SAVED},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Make it what it was when `state` was taken."""
        for group in _SAVED:
            getattr(self, group).update(state[group])
        self.norms.counts, self.norms.total = state["norms"]
        self.durations.counts, self.durations.total = state["durations"]
        self._recent.extend(state["recent"])


def _kind(nan: bool, inf: bool) -> str:
    return "nan" if nan else "inf" if inf else ""
