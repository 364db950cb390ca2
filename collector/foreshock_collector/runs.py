"""State of every run: takes batches in, puts steps together, hands them to detection and diagnosis, counts.

Clocks come in as arguments. What must survive a crash leaves through `Run.snapshot`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from foreshock_collector.catalogue import (
    DROP_REASONS,
    GRADIENT_NORM,
    INCIDENT_VERDICTS,
    STEP_DURATION,
)
from foreshock_collector.detection import Detector, Event
from foreshock_collector.diagnosis import diagnose
from foreshock_collector.steps import ModelFacts, RankRow, Step, put_together, rows_of
from foreshock_protos.v1 import telemetry_pb2 as pb

SETTLE_SECONDS = 2.0
"""How long a step waits for ranks that have not reported it."""
SETTLE_BAD_SECONDS = 0.5
"""The same for a step that is not finite: the page must not wait, and the other ranks' evidence is worth a moment."""
WINDOW_STEPS = 512
STALL_STEPS, STALL_LEAST_SECONDS = 20, 600.0
_EVENTS = 500
NONFINITE_KINDS = tuple((source, kind) for source in ("loss", "gradient") for kind in ("nan", "inf"))


@dataclass
class Instance:
    """One attach of one rank."""

    hello: pb.Hello
    attempt: int
    position: int = 0
    closed: str = ""
    """How it left, empty while it is there."""
    lost: bool = False
    last_report: float = 0.0
    last_row: RankRow | None = None
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.hello.topology.rank

    @property
    def reporting(self) -> bool:
        """There, or gone in peace."""
        return not self.lost and self.closed in ("", "FINISHED", "DETACHED")


@dataclass
class Histogram:
    """Cumulative only when shown; one count per bucket here."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        """Empty."""
        return cls(bounds=bounds, counts=[0] * (len(bounds) + 1))

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.total += value


@dataclass
class _Pending:
    rows: dict[int, RankRow]
    since: float


class Run:
    """One run, over all its attempts."""

    def __init__(self, experiment: str, name: str) -> None:
        self.experiment = experiment
        self.name = name
        self.launches: list[str] = []
        self.instances: dict[str, Instance] = {}
        self.detector = Detector()
        self.counters: dict[str, int] = dict.fromkeys(
            ("steps", "clipped", "skipped", "spike", "build_up", "loss_spike"), 0
        )
        self.nonfinite: dict[str, int] = {f"{source} {kind}": 0 for source, kind in NONFINITE_KINDS}
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)
        self.incident_counts: dict[str, int] = dict.fromkeys(INCIDENT_VERDICTS, 0)
        self.last_incident: dict[str, float] = dict.fromkeys(INCIDENT_VERDICTS, 0.0)
        self.last: dict[str, float] = dict.fromkeys(("spike", "build_up", "loss_spike", "nonfinite", "step"), 0.0)
        self.levels: dict[str, float] = {}
        """Newest finite value of each gauge."""
        self.norms = Histogram.of(GRADIENT_NORM.buckets)
        self.durations = Histogram.of(STEP_DURATION.buckets)
        self.incidents: list[dict[str, Any]] = []
        self.settled: tuple[int, int] = (-1, -1)
        """(attempt, step) up to which steps have been through detection."""
        self.events: deque[Event] = deque(maxlen=_EVENTS)
        self.window: deque[Step] = deque(maxlen=WINDOW_STEPS)
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._recent: deque[float] = deque(maxlen=64)

    # -- in ------------------------------------------------------------------------------------------------------

    def greet(self, hello: pb.Hello, now: float) -> Instance:
        """An instance says hello, for the first time or again."""
        if hello.instance not in self.instances:
            if hello.launch not in self.launches:
                self.launches.append(hello.launch)
            attempt = self.launches.index(hello.launch)
            self.instances[hello.instance] = Instance(hello=hello, attempt=attempt)
        instance = self.instances[hello.instance]
        instance.last_report = now
        return instance

    def take(self, batch: pb.StepBatch, now: float) -> None:
        """Records of one instance: those already stored are left out, a gap is counted. Raises `ValueError`."""
        instance = self.instances[batch.instance]
        rows = rows_of(batch, instance.rank, len(instance.hello.model.layers))
        instance.last_report = now
        for reason, count in batch.dropped.items():
            # Cumulative since the attach: only what is new counts, however often it is told.
            if reason in self.dropped:
                self.dropped[reason] += max(0, count - instance.dropped.get(reason, 0))
                instance.dropped[reason] = max(count, instance.dropped.get(reason, 0))
        rows = [row for row in rows if row.sequence > instance.position]
        if not rows:
            return
        self.dropped["ring_overrun"] += rows[0].sequence - instance.position - 1
        instance.position = rows[-1].sequence
        instance.last_row = rows[-1]
        for row in rows:
            if row.complete:
                self._add(instance.attempt, row, now)
            else:
                self.dropped["never_finished"] += 1

    def lose(self, instance: Instance) -> None:
        """Its process is gone without a goodbye."""
        instance.lost = True

    def close(self, instance: Instance, reason: str) -> None:
        """It has left."""
        instance.closed = reason

    def _add(self, attempt: int, row: RankRow, now: float) -> None:
        key = (attempt, row.step)
        if key <= self.settled:
            self._complete(key, row)
            return
        pending = self._pending.setdefault(key, _Pending(rows={}, since=now))
        pending.rows[row.rank] = row

    def _complete(self, key: tuple[int, int], row: RankRow) -> None:
        for step in reversed(self.window):
            if (step.attempt, step.step) == key:
                step.ranks.setdefault(row.rank, row)
                return

    # -- steps ---------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> list[Step]:
        """Steps that are whole, or have waited long enough, in order, through detection."""
        settled = []
        for key in sorted(self._pending):
            pending = self._pending[key]
            patience = SETTLE_BAD_SECONDS if any(row.bad for row in pending.rows.values()) else SETTLE_SECONDS
            if not self._awaited(key[0]) <= pending.rows.keys() and now - pending.since < patience:
                break
            del self._pending[key]
            previous = self._previous(key[0], pending.rows)
            step = put_together(key[0], pending.rows, expected=self.world_size(key[0]), previous=previous)
            self.settled = key
            self._detect(step, now)
            settled.append(step)
        return settled

    def _awaited(self, attempt: int) -> set[int]:
        ranks = set(range(self.world_size(attempt)))
        gone = {i.rank for i in self.instances.values() if i.attempt == attempt and (i.lost or i.closed)}
        return ranks - gone

    def _previous(self, attempt: int, rows: dict[int, RankRow]) -> RankRow | None:
        rank = min(rows)
        last = self.window[-1] if self.window else None
        row = last.ranks.get(rank) if last is not None and last.attempt == attempt else None
        return row if row is not None and row.sequence + 1 == rows[rank].sequence else None

    def _detect(self, step: Step, now: float) -> None:
        self.window.append(step)
        bad = step.nonfinite
        self._count(step, bad, now)
        finite_before = self.detector.finite_ever
        failing = self.detector.failing
        events = self.detector.update(
            attempt=step.attempt, step=step.step, norm=step.global_norm, loss=step.loss, nonfinite=len(bad)
        )
        for event in events:
            if event.kind in self.counters:
                self.counters[event.kind] += 1
            if event.kind in self.last:
                self.last[event.kind] = now
            if event.kind != "nonfinite" or not failing:
                self.events.append(event)
            if event.kind == "recovered":
                self._close_incident(now)
        if bad and not failing:
            verdict = diagnose(list(self.window), list(self.events), self.model, finite_before=finite_before)
            self.incidents.append(
                {
                    "id": len(self.incidents) + 1,
                    "opened_seconds": now,
                    "closed_seconds": None,
                    "verdict": verdict.as_json(),
                }
            )
            self.incident_counts[verdict.cause] += 1
            self.last_incident[verdict.cause] = now

    def _close_incident(self, now: float) -> None:
        if self.incidents and self.incidents[-1]["closed_seconds"] is None:
            self.incidents[-1]["closed_seconds"] = now

    def _count(self, step: Step, bad: list[tuple[str, str]], now: float) -> None:
        self.counters["steps"] += 1
        self.counters["clipped"] += step.clip_coefficient < 1
        self.counters["skipped"] += step.skipped
        for source, kind in bad:
            self.nonfinite[f"{source} {kind}"] += 1
        self.last["step"] = now
        if math.isfinite(step.global_norm):
            self.norms.add(step.global_norm)
        if step.duration_seconds is not None:
            self.durations.add(step.duration_seconds)
            self._recent.append(step.duration_seconds)
        levels = {
            "step": float(step.step),
            "global_norm": step.global_norm,
            "clip_coefficient": step.clip_coefficient,
            "learning_rate": step.learning_rate,
            "loss_scale": step.loss_scale,
            "loss": math.nan if step.loss is None else step.loss,
        }
        self.levels |= {name: value for name, value in levels.items() if math.isfinite(value)}

    # -- out -----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelFacts:
        """Of the newest attempt."""
        newest = self.newest()
        return ModelFacts.from_hello(newest[0].hello) if newest else ModelFacts()

    def newest(self) -> list[Instance]:
        """Instances of the newest attempt, by rank."""
        attempt = len(self.launches) - 1
        return sorted((i for i in self.instances.values() if i.attempt == attempt), key=lambda i: i.rank)

    def world_size(self, attempt: int) -> int:
        """How many ranks an attempt has."""
        return next(i.hello.topology.world_size for i in self.instances.values() if i.attempt == attempt)

    def last_heard(self) -> float:
        """When any rank last reported."""
        return max((i.last_report for i in self.instances.values()), default=0.0)

    def active(self, now: float, silent_after: float) -> bool:
        """A rank of the newest attempt is there, and has been heard of lately."""
        there = any(not i.closed and not i.lost for i in self.newest())
        return there and now - self.last_heard() < silent_after

    def stall_after(self) -> float:
        """Seconds without a step that mean a stall."""
        return max(STALL_LEAST_SECONDS, STALL_STEPS * median(self._recent)) if self._recent else STALL_LEAST_SECONDS

    def snapshot(self) -> dict[str, Any]:
        """All that must survive, as JSON."""
        return {
            "experiment": self.experiment,
            "launches": self.launches,
            "detector": self.detector.state(),
            "counters": self.counters,
            "nonfinite": self.nonfinite,
            "dropped": self.dropped,
            "incident_counts": self.incident_counts,
            "last_incident": self.last_incident,
            "last": self.last,
            "levels": self.levels,
            "norms": [self.norms.counts, self.norms.total],
            "durations": [self.durations.counts, self.durations.total],
            "incidents": self.incidents,
            "settled": list(self.settled),
            "events": [asdict(event) for event in self.events],
            "recent": list(self._recent),
        }

    @classmethod
    def restored(cls, name: str, snapshot: dict[str, Any]) -> Run:
        """A run as it was when `snapshot` was taken; its instances and window follow through `recall`."""
        run = cls(snapshot["experiment"], name)
        run.launches = snapshot["launches"]
        run.detector = Detector(snapshot["detector"])
        for group in ("counters", "nonfinite", "dropped", "incident_counts", "last_incident", "last", "levels"):
            getattr(run, group).update(snapshot[group])
        run.norms.counts, run.norms.total = snapshot["norms"]
        run.durations.counts, run.durations.total = snapshot["durations"]
        run.incidents = snapshot["incidents"]
        run.settled = (snapshot["settled"][0], snapshot["settled"][1])
        run.events.extend(Event(**event) for event in snapshot["events"])
        run._recent.extend(snapshot["recent"])
        return run

    def recall(self, batch: pb.StepBatch, now: float) -> None:
        """Put stored records back: into the window if they are settled, else among those that wait."""
        instance = self.instances[batch.instance]
        for row in rows_of(batch, instance.rank, len(instance.hello.model.layers)):
            instance.last_row = row
            key = (instance.attempt, row.step)
            if not row.complete:
                continue
            if key > self.settled:
                self._add(instance.attempt, row, now)
            elif any((s.attempt, s.step) == key for s in self.window):
                self._complete(key, row)
            else:
                rows = {row.rank: row}
                expected = self.world_size(instance.attempt)
                self.window.append(put_together(instance.attempt, rows, expected=expected, previous=None))


class Runs:
    """All runs, found by name or by instance."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._homes: dict[str, Run] = {}

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def get(self, name: str) -> Run | None:
        """The run of this name."""
        return self._runs.get(name)

    def home(self, instance: str) -> Run | None:
        """The run that an instance belongs to."""
        return self._homes.get(instance)

    def add(self, run: Run) -> None:
        """A run from the store."""
        self._runs[run.name] = run

    def greet(self, hello: pb.Hello, now: float) -> Instance:
        """Find or make the run of an instance."""
        run = self._runs.setdefault(hello.run, Run(hello.experiment, hello.run))
        self._homes[hello.instance] = run
        return run.greet(hello, now)
