"""Detection, faults and diagnosis for a run's steps, in order: opens and closes its incidents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from foreshock_collector.analysis.departures import ending_of, verdict_on_ending, verdict_on_silence
from foreshock_collector.analysis.detection import Event, Failure
from foreshock_collector.analysis.diagnosis import diagnose
from foreshock_collector.analysis.fault_verdicts import verdict_on_fault, verdict_on_stall
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.analysis.step_signals import StepSignals, signals_of
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.records.steps import Step
from foreshock_collector.records.window import Window
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.events import DetectedEvent, Events
from foreshock_collector.state.incidents import DEATH, FAILURE, SILENCE, Incidents
from foreshock_collector.state.instances import CLEAN_EXITS
from foreshock_collector.state.totals import Totals

_REPORTING_SECONDS = 60.0
"""A rank that reported within it is alive: its recorder reports every second."""


class Evaluator:
    """Evaluates the steps and ranks of one run: what it finds goes to the totals, the events and the incidents.

    Clocks come in as arguments.
    """

    def __init__(self, rules: Rules, totals: Totals, incidents: Incidents, events: Events) -> None:
        self._rules = rules
        self._totals = totals
        self._incidents = incidents
        self._events = events

    def steps(self, attempt: Attempt, steps: Sequence[Step], now: float) -> None:
        """Evaluate new steps of an attempt, in order."""
        for step, signals in zip(steps, signals_of(attempt.buffer, steps) if steps else (), strict=True):
            self._detect(attempt, step, now)
            self._check_faults(attempt, step, signals, now)
            if not step.nonfinite:
                attempt.noise.update(signals.agreement, step.global_norm, attempt.world_size)
        withheld = attempt.detector.withheld
        if withheld is not None and attempt.ended_at(withheld.event.sequence):
            # Its script skipped steps because they were not finite, and then it ended.
            attempt.detector.end()
            self._record_event(attempt, withheld.event, withheld.failure, now)
        if attempt.needs_reevaluation:
            self._reevaluate(attempt, now)

    def _detect(self, attempt: Attempt, step: Step, now: float) -> None:
        detector = attempt.detector
        was_failing, failure = detector.failing, detector.failure_at(step.sequence)
        for event in detector.update(
            attempt=attempt.number,
            sequence=step.sequence,
            step=step.step,
            norm=step.global_norm,
            loss=step.loss,
            rate=step.learning_rate,
            nonfinite=len(step.nonfinite),
            skipped=step.update_skipped,
            # A scaler's overflow is no failure, also where it is the last step of all.
            guarded=not step.stepped and not step.overflow,
            rules=self._rules,
        ):
            self._record_event(attempt, event, failure, now)
        if step.nonfinite and was_failing:
            self._incidents.extend(attempt, FAILURE, step.step, now)

    def _record_event(self, attempt: Attempt, event: Event, failure: Failure, now: float) -> None:
        """Record what the detector found. failure: that begins with the event, where it is a non-finite step."""
        self._totals.add_event(event.kind, event.step, now, superseded=attempt.superseded)
        self._events.add(DetectedEvent(event=event, seen_seconds=now))
        if event.kind == "recovered":
            self._incidents.close(attempt, FAILURE, now)
        if event.kind == "nonfinite":
            attempt.failure = failure
            self._open(attempt, FAILURE, self._diagnose(attempt, failure), event.sequence, now)

    def _check_faults(self, attempt: Attempt, step: Step, signals: StepSignals, now: float) -> None:
        detector = attempt.detector
        for change in attempt.faults.update(
            step,
            signals,
            building_up=detector.gradient.in_build_up,
            exploded=detector.first_steps.exploded,
            rules=self._rules.faults,
        ):
            if not change.begins:
                self._incidents.close(attempt, change.cause, now)
            elif change.cause not in attempt.incidents:
                verdict = verdict_on_fault(change, attempt.number, attempt.model)
                self._open(attempt, change.cause, verdict, step.sequence, now)

    def _diagnose(self, attempt: Attempt, failure: Failure) -> Verdict:
        """The verdict on the attempt's newest failure, by what is known by now."""
        verdict = diagnose(
            [step for step in attempt.steps if step.sequence <= failure.sequence],
            self._events.detected(attempt.number, upto=failure.sequence),
            attempt.buffer,
            attempt.model,
            finite_before=failure.finite_before,
            climbing=failure.climbing,
            diverging="loss_divergence" in attempt.incidents,
            rules=self._rules,
        )
        return replace(verdict, evidence=(*verdict.evidence, attempt.ending)) if attempt.ending else verdict

    def _reevaluate(self, attempt: Attempt, now: float) -> None:
        """A rank has reported the step that failed after the failure was diagnosed: diagnose it again."""
        attempt.needs_reevaluation = False
        number, failure = attempt.incidents.get(FAILURE), attempt.failure
        if failure is None or number is None:
            return
        if attempt.steps and attempt.steps[0].sequence <= failure.sequence:
            self._incidents.reevaluate(attempt, FAILURE, self._diagnose(attempt, failure), now)
            self._add_window(attempt, number, failure.sequence)

    def check_departures(self, attempt: Attempt, now: float) -> None:
        """Explain ranks that left abnormally: what the first died of, once its peers have had time to report."""
        left = attempt.departures()
        if not attempt.departures_pending:
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
                attempt.ending = ending.description
                self._incidents.add_evidence(attempt, FAILURE, ending.description, now)
            return
        verdict = verdict_on_ending(attempt.number, ending, attempt.world_size, silent)
        self._incidents.close(attempt, SILENCE, now)
        if DEATH in attempt.incidents:
            self._incidents.reevaluate(attempt, DEATH, verdict, now)
        else:
            self._open(attempt, DEATH, verdict, attempt.finalized, now)

    def check_silence(self, attempt: Attempt, now: float, seconds: float) -> None:
        """Open an incident where the attempt has not reported for so long, though some ranks have not left."""
        silent = [(i.rank, i.last_step) for i in attempt.instances.values() if not i.ended]
        done = [i.last_step or 0 for i in attempt.instances.values() if i.ended in CLEAN_EXITS]
        if done and all((step or 0) >= max(done) for _, step in silent):
            # Others have reported that the training is over; the Exit messages of these ranks were lost.
            attempt.outcome = "ended"
        elif not attempt.outcome and not attempt.incidents.keys() & {DEATH, FAILURE}:
            verdict = verdict_on_silence(attempt.number, silent, attempt.world_size, seconds=seconds)
            self._open(attempt, SILENCE, verdict, attempt.finalized, now)

    def check_stall(self, attempt: Attempt, now: float, *, since: float) -> None:
        """Open or close an incident: by the run's own pace, no step comes though ranks run. since: Unix time of the
        collector's start, or of the attempt's.
        """
        # A collector that has just started does not end a stall that was open before.
        last = self._totals.last["step"]
        quiet = now - (last if "stalled" in attempt.incidents else max(last, since))
        ranks = attempt.instances.values()
        live = [i for i in ranks if not i.closed and now - max(i.last_report, since) < _REPORTING_SECONDS]
        limit = self._totals.stall_threshold(attempt.finalized)
        if quiet <= limit or not live:
            self._incidents.close(attempt, "stalled", now)
        elif not attempt.incidents.keys() & {"stalled", DEATH, FAILURE}:
            step = max((i.last_step for i in live if i.last_step is not None), default=None)
            behind = [i.rank for i in live if i.last_step != step or not i.last_finished]
            verdict = verdict_on_stall(
                attempt.number,
                step,
                quiet,
                limit,
                passes={i.rank: i.backward_passes for i in live},
                unfinished=behind if len(behind) < len(live) else [],
                away=sorted(set(range(attempt.world_size)) - {i.rank for i in live}),
            )
            self._open(attempt, "stalled", verdict, attempt.finalized, now)

    def _open(self, attempt: Attempt, key: str, verdict: Verdict, sequence: int, now: float) -> None:
        number = self._incidents.open(attempt, key, verdict, sequence, now)
        if not attempt.evicted:
            self._add_window(attempt, number, sequence)

    def _add_window(self, attempt: Attempt, number: int, sequence: int) -> None:
        self._incidents.add_window(
            number, Window.from_buffer(attempt.buffer, sequence - self._rules.lead_steps, sequence)
        )
