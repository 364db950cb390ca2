"""Takes a run's steps, in order, through detection, faults and diagnosis, and opens and closes its incidents."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from foreshock_collector.attempts import Attempt
from foreshock_collector.detection import Event
from foreshock_collector.diagnosis import diagnose
from foreshock_collector.fault_verdicts import verdict_on_fault, verdict_on_loss, verdict_on_stall
from foreshock_collector.faults import Seen, look
from foreshock_collector.incidents import FAILURE, Incidents
from foreshock_collector.rules import Rules
from foreshock_collector.steps import Step
from foreshock_collector.totals import Totals
from foreshock_collector.verdicts import Verdict
from foreshock_collector.window import Window

_LOST_PEER = re.compile(r"gloo|nccl|DistBackendError|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What the exceptions of a process group say when another rank has gone."""
_HEARD_SECONDS = 60.0
"""A rank that was heard of so lately is alive: its recorder says so every second."""


class Judge:
    """Of one run. Clocks come in as arguments; what it finds goes to the totals, the incidents and the two calls."""

    def __init__(
        self,
        rules: Rules,
        totals: Totals,
        incidents: Incidents,
        events: deque[dict[str, Any]],
        *,
        note: Callable[[dict[str, Any], float], None],
        keep: Callable[[int, Window], None],
    ) -> None:
        """events: of the run, newest last. note: an event, and when. keep: the records before an incident."""
        self._rules = rules
        self._totals = totals
        self._incidents = incidents
        self._events = events
        self._note = note
        self._keep = keep

    def steps(self, attempt: Attempt, steps: Sequence[Step], now: float) -> None:
        """New steps of an attempt."""
        for step, seen in zip(steps, look(attempt.board, steps) if steps else (), strict=True):
            self._detect(attempt, step, now)
            self._lasting(attempt, step, seen, now)
            if not step.nonfinite:
                attempt.noise.take(seen.agreement, step.global_norm, attempt.world_size)
        if attempt.more_is_known:
            self._judge_anew(attempt, now)

    def _detect(self, attempt: Attempt, step: Step, now: float) -> None:
        detector = attempt.detector
        before = {"finite_before": detector.finite_ever, "climbing": detector.climbing}
        was_failing = detector.failing
        for event in detector.update(
            attempt=attempt.number,
            sequence=step.sequence,
            step=step.step,
            norm=step.global_norm,
            loss=step.loss,
            rate=step.learning_rate,
            nonfinite=len(step.nonfinite),
            left_out=step.left_out,
        ):
            self._totals.add_event(event.kind, event.step, now)
            self._note(asdict(event), now)
            if event.kind == "recovered":
                self._incidents.close(attempt, FAILURE, now)
            if event.kind == "nonfinite":
                attempt.failure = {"sequence": step.sequence, **before}
                self._open(attempt, FAILURE, self._diagnose(attempt), step.sequence, now)
        if step.nonfinite and was_failing:
            self._incidents.goes_on(attempt, FAILURE, step.step, now)

    def _lasting(self, attempt: Attempt, step: Step, seen: Seen, now: float) -> None:
        for change in attempt.faults.update(step, seen, building_up=attempt.detector.gradient.in_build_up):
            if not change.begins:
                self._incidents.close(attempt, change.cause, now)
            elif change.cause not in attempt.incidents:
                verdict = verdict_on_fault(change, attempt.number, attempt.model)
                self._open(attempt, change.cause, verdict, step.sequence, now)

    def _diagnose(self, attempt: Attempt) -> Verdict:
        """The verdict on the attempt's newest failure, by what is known by now."""
        failure = attempt.failure
        fields = Event.__dataclass_fields__
        events = [
            Event(**{name: e[name] for name in fields})
            for e in self._events
            if e["attempt"] == attempt.number and "score" in e and e["sequence"] <= failure["sequence"]
        ]
        return diagnose(
            [step for step in attempt.steps if step.sequence <= failure["sequence"]],
            events,
            attempt.board,
            attempt.model,
            finite_before=failure["finite_before"],
            climbing=failure["climbing"],
            diverging="loss_divergence" in attempt.incidents,
            rules=self._rules,
        )

    def _judge_anew(self, attempt: Attempt, now: float) -> None:
        """A rank has told of the step that began the failure after it was judged."""
        attempt.more_is_known = False
        number, sequence = attempt.incidents.get(FAILURE), attempt.failure["sequence"]
        if number is not None and attempt.steps and attempt.steps[0].sequence <= sequence:
            self._incidents.judge_anew(attempt, FAILURE, self._diagnose(attempt), now)
            self._keep_window(attempt, number, sequence)

    def departures(self, attempt: Attempt, now: float) -> None:
        """A rank was lost, if nothing else explains its end: a failure or another's exception ends all."""
        lost = sorted(
            (instance.lost_seconds, instance.rank, instance.last_step or 0)
            for instance in attempt.instances.values()
            if instance.lost_seconds
        )
        if not lost or attempt.loss_judged or now - attempt.lost_heard < self._rules.faults.lost_seconds:
            return
        attempt.loss_judged = True
        errors = (i.detail for i in attempt.instances.values() if i.ended == "EXCEPTION")
        # Ranks that wait for a dead one in a collective end with an error of their own.
        if FAILURE not in attempt.incidents and all(_LOST_PEER.search(error) for error in errors):
            verdict = verdict_on_loss(attempt.number, lost, attempt.world_size)
            self._open(attempt, "rank_lost", verdict, attempt.settled, now)

    def standstill(self, attempt: Attempt, now: float, *, since: float) -> None:
        """It makes no step though its ranks are there, by the run's own pace. since: at least so long watched."""
        quiet = now - max(self._totals.last["step"], since)
        there = [i for i in attempt.instances.values() if not i.closed and now - i.last_report < _HEARD_SECONDS]
        usual = self._totals.stall_after()
        if quiet <= usual or not there:
            self._incidents.close(attempt, "stalled", now)
        elif not attempt.incidents.keys() & {"stalled", "rank_lost", FAILURE}:
            step = max(instance.last_step or 0 for instance in there)
            behind = [i.rank for i in there if (i.last_step or 0) < step or not i.last_finished]
            missing = sorted(behind) if len(behind) < len(there) else []
            verdict = verdict_on_stall(attempt.number, step, quiet, usual, missing)
            self._open(attempt, "stalled", verdict, attempt.settled, now)

    def _open(self, attempt: Attempt, key: str, verdict: Verdict, sequence: int, now: float) -> None:
        number = self._incidents.open(attempt, key, verdict, sequence, now)
        if not attempt.resting:
            self._keep_window(attempt, number, sequence)

    def _keep_window(self, attempt: Attempt, number: int, sequence: int) -> None:
        self._keep(number, Window.of(attempt.board, sequence - self._rules.lead_steps, sequence))
