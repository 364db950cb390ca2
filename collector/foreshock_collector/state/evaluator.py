"""Takes a run's steps, in order, through detection, faults and diagnosis, and opens and closes its incidents."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from foreshock_collector.analysis.departures import ending_of, verdict_on_ending, verdict_on_silence
from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.diagnosis import diagnose
from foreshock_collector.analysis.fault_verdicts import verdict_on_fault, verdict_on_stall
from foreshock_collector.analysis.faults import StepSignals, signals_of
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.records.steps import Step
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import PEACEFUL, Attempt
from foreshock_collector.state.incidents import DEATH, FAILURE, SILENCE, Incidents
from foreshock_collector.state.totals import Totals

_HEARD_SECONDS = 60.0
"""A rank that was heard of so lately is alive: its recorder says so every second."""


class Evaluator:
    """Of one run. Clocks come in as arguments; what it finds goes to the totals, the incidents and the two calls."""

    def __init__(
        self,
        rules: Rules,
        totals: Totals,
        incidents: Incidents,
        events: deque[dict[str, Any]],
        *,
        record: Callable[[dict[str, Any], float], None],
        keep: Callable[[int, Window], None],
    ) -> None:
        """events: of the run, newest last. record: an event, and when. keep: the records before an incident."""
        self._rules = rules
        self._totals = totals
        self._incidents = incidents
        self._events = events
        self._record = record
        self._keep = keep

    def steps(self, attempt: Attempt, steps: Sequence[Step], now: float) -> None:
        """New steps of an attempt."""
        for step, seen in zip(steps, signals_of(attempt.buffer, steps) if steps else (), strict=True):
            self._detect(attempt, step, now)
            self._check_faults(attempt, step, seen, now)
            if not step.nonfinite:
                attempt.noise.update(seen.agreement, step.global_norm, attempt.world_size)
        withheld = attempt.detector.withheld
        if withheld is not None and attempt.ended_at(withheld["event"]["sequence"]):
            # Its script left steps out because they were not finite, and then it ended.
            last = attempt.detector.end()
            assert last is not None
            self._record_event(attempt, *last, now)
        if attempt.needs_reevaluation:
            self._reevaluate(attempt, now)

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
            # A scaler's overflow is none, also where it is the last step of all.
            guarded=not step.stepped and not step.overflow,
        ):
            self._record_event(attempt, event, before, now)
        if step.nonfinite and was_failing:
            self._incidents.extend(attempt, FAILURE, step.step, now)

    def _record_event(self, attempt: Attempt, event: Event, before: dict[str, Any], now: float) -> None:
        """before: what was known before its step."""
        self._totals.add_event(event.kind, event.step, now, past=attempt.past)
        self._record(asdict(event), now)
        if event.kind == "recovered":
            self._incidents.close(attempt, FAILURE, now)
        if event.kind == "nonfinite":
            attempt.failure = {"sequence": event.sequence, **before}
            self._open(attempt, FAILURE, self._diagnose(attempt), event.sequence, now)

    def _check_faults(self, attempt: Attempt, step: Step, seen: StepSignals, now: float) -> None:
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
        verdict = diagnose(
            [step for step in attempt.steps if step.sequence <= failure["sequence"]],
            events,
            attempt.buffer,
            attempt.model,
            finite_before=failure["finite_before"],
            climbing=failure["climbing"],
            diverging="loss_divergence" in attempt.incidents,
            rules=self._rules,
        )
        return replace(verdict, evidence=(*verdict.evidence, attempt.ending)) if attempt.ending else verdict

    def _reevaluate(self, attempt: Attempt, now: float) -> None:
        """A rank has told of the step that began the failure after it was judged."""
        attempt.needs_reevaluation = False
        number, sequence = attempt.incidents.get(FAILURE), attempt.failure["sequence"]
        if number is not None and attempt.steps and attempt.steps[0].sequence <= sequence:
            self._incidents.reevaluate(attempt, FAILURE, self._diagnose(attempt), now)
            self._keep_window(attempt, number, sequence)

    def check_departures(self, attempt: Attempt, now: float) -> None:
        """Ranks have left as they should not: say of what the first died, once its peers have had time to tell."""
        left = attempt.departures()
        if len(left) == attempt.departures_checked:
            return
        if now - min(departure.seconds for departure in left) < self._rules.faults.lost_seconds:
            return
        attempt.departures_checked = len(left)
        ending = ending_of(left)
        if ending is None:
            on_purpose = any(departure.on_purpose for departure in left)
            attempt.outcome = attempt.outcome or ("interrupted" if on_purpose else "ended")
            return
        attempt.outcome = "failed"
        silent = [
            (i.rank, i.last_step)
            for i in attempt.instances.values()
            if not i.ended and not i.left_seconds and now - i.last_report > self._rules.faults.lost_seconds
        ]
        if FAILURE in attempt.incidents:
            # Paged for already: a script that ends at a NaN, or that computes on until something breaks.
            if not attempt.ending:
                attempt.ending = ending.told
                self._incidents.add_evidence(attempt, FAILURE, ending.told, now)
            return
        verdict = verdict_on_ending(attempt.number, ending, attempt.world_size, silent)
        self._incidents.close(attempt, SILENCE, now)
        if DEATH in attempt.incidents:
            self._incidents.reevaluate(attempt, DEATH, verdict, now)
        else:
            self._open(attempt, DEATH, verdict, attempt.finalized, now)

    def check_silence(self, attempt: Attempt, now: float, seconds: float) -> None:
        """Nothing has been heard of it for so long, and some ranks have not left."""
        silent = [(i.rank, i.last_step) for i in attempt.instances.values() if not i.ended]
        done = [i.last_step or 0 for i in attempt.instances.values() if i.ended in PEACEFUL]
        if done and all((step or 0) >= max(done) for _, step in silent):
            # Others have told that the training is over; the last word of these was lost.
            attempt.outcome = "ended"
        elif not attempt.outcome and not attempt.incidents.keys() & {DEATH, FAILURE}:
            verdict = verdict_on_silence(attempt.number, silent, attempt.world_size, seconds=seconds)
            self._open(attempt, SILENCE, verdict, attempt.finalized, now)

    def check_stall(self, attempt: Attempt, now: float, *, since: float) -> None:
        """It makes no step though its ranks are there, by the run's own pace. since: at least so long watched."""
        # That a collector has only just started is no step that would end a stall.
        last = self._totals.last["step"]
        quiet = now - (last if "stalled" in attempt.incidents else max(last, since))
        ranks = attempt.instances.values()
        there = [i for i in ranks if not i.closed and now - max(i.last_report, since) < _HEARD_SECONDS]
        limit = self._totals.stall_after(attempt.finalized)
        if quiet <= limit or not there:
            self._incidents.close(attempt, "stalled", now)
        elif not attempt.incidents.keys() & {"stalled", DEATH, FAILURE}:
            step = max((i.last_step for i in there if i.last_step is not None), default=None)
            behind = [i.rank for i in there if i.last_step != step or not i.last_finished]
            verdict = verdict_on_stall(
                attempt.number,
                step,
                quiet,
                limit,
                passes={i.rank: i.backward_passes for i in there},
                unfinished=behind if len(behind) < len(there) else [],
                away=sorted(set(range(attempt.world_size)) - {i.rank for i in there}),
            )
            self._open(attempt, "stalled", verdict, attempt.finalized, now)

    def _open(self, attempt: Attempt, key: str, verdict: Verdict, sequence: int, now: float) -> None:
        number = self._incidents.open(attempt, key, verdict, sequence, now)
        if not attempt.evicted:
            self._keep_window(attempt, number, sequence)

    def _keep_window(self, attempt: Attempt, number: int, sequence: int) -> None:
        self._keep(number, Window.of(attempt.buffer, sequence - self._rules.lead_steps, sequence))
