"""Runs detection over the rows of a log as the live service does over steps: calm blocks at once, others one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.diagnosis import diagnose, verdict_on_finite_log
from foreshock_collector.analysis.fault_verdicts import verdict_on_fault
from foreshock_collector.analysis.faults import FaultDetector
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.analysis.step_signals import StepSignals
from foreshock_collector.analysis.verdicts import Verdict, make_verdict
from foreshock_collector.commands.logs.columns import Floats, Log
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import LARGEST, ModelFacts, Step

_BUFFER, _MODEL = RecordBuffer(world_size=1, layers=0), ModelFacts()
_UNSEEN = StepSignals(math.nan, math.nan, -1, math.nan)
"""A log contains no ranks or layers."""
_WINDOW_ROWS = 512
"""Rows that a diagnosis sees, as many as the live service keeps."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 8192
_EMPTY_ROWS = 20
"""Rows in a row without any value that no logging interval explains."""


class ReplayRows:
    """Prepares the columns of a log for detection."""

    def __init__(self, log: Log, rules: Rules) -> None:
        self.log = log
        self.loss, self.norm, self.rate = (_bounded(column) for column in (log.loss, log.norm, log.rate))
        self.nonfinite = (log.loss_logged & ~np.isfinite(log.loss)) | (log.norm_logged & ~np.isfinite(log.norm))
        with np.errstate(all="ignore"):
            self.gaps = np.nan_to_num(np.maximum(0.0, np.diff(log.step, prepend=log.step[:1])), posinf=0.0)
            last = np.concatenate(([0.0], self.gaps[:-1]))
            factor = rules.interval_change
            self.restarts = ((self.gaps > factor * last) & (last > 0)) | ((last > factor * self.gaps) & (self.gaps > 0))
            known = np.flatnonzero(np.isfinite(self.rate) & (self.rate > 0))
            jumps = np.abs(np.diff(np.log(self.rate[known]))) > math.log(rules.planned_rate_change)
        self.eventful = self.nonfinite | self.restarts
        self.eventful[known[1:][jumps]] = True

    def __len__(self) -> int:
        return len(self.log)

    def step(self, row: int) -> Step:
        """Return a row as a step of one rank."""
        log, loss, norm = self.log, float(self.loss[row]), float(self.norm[row])
        label = float(log.step[row])
        has_loss, has_norm = bool(log.loss_logged[row]), bool(log.norm_logged[row])
        return Step(
            attempt=0,
            sequence=row + 1,
            step=int(label) if math.isfinite(label) else row,
            wall_seconds=0.0,
            duration_seconds=None,
            learning_rate=float(self.rate[row]),
            loss=loss if has_loss else None,
            loss_scale=1.0,
            global_norm=norm,
            clip_coefficient=1.0,
            skipped=False,
            nan_loss=has_loss and math.isnan(loss),
            inf_loss=has_loss and math.isinf(loss),
            nan_gradient=has_norm and math.isnan(norm),
            inf_gradient=has_norm and math.isinf(norm),
            ranks=1,
        )

    def overflows(self, first: int, *, scaled: bool) -> int:
        """Count non-finite gradients in a row from `first` on, if losses are finite and training continues; else 0.

        scaled: earlier overflows have shown that a GradScaler skips them.
        """
        nonfinite = self.nonfinite[first:]
        count = int(nonfinite.argmin()) if not nonfinite.all() else len(nonfinite)
        if not np.isfinite(self.loss[first : first + count + 1]).all():
            return 0
        # Where the log ends, one such step proves nothing; a scaler must have skipped many with a finite loss. A log
        # without a finite gradient shows no scaler at all.
        ends = first + count == len(self)
        return count if not ends or scaled or (first > 0 and count >= DEFAULT.collapse_after) else 0


class LogFollower:
    """Follows a log from its first row and keeps what it finds."""

    def __init__(self, rows: ReplayRows, rules: Rules, *, every: bool = False) -> None:
        """every: diagnose every failure instead of the first."""
        self.rows = rows
        """All rows; may be replaced by more rows that begin with these."""
        self.done = 0
        """Number of rows that were processed."""
        self.events: list[Event] = []
        self.verdicts: list[Verdict] = []
        """Verdicts on failures and lasting faults, in the order in which they were found."""
        self.first_nonfinite: int | None = None
        """Row of the first failure."""
        self._rules, self._every = rules, every
        self._detector, self._faults = Detector(), FaultDetector()
        self._failure: Verdict | None = None
        self._trouble: Verdict | None = None
        """Verdict on the first lasting fault."""

    def follow(self, at: Callable[[int], None] = lambda _: None, *, held_back: int = 0) -> None:
        """Process the rows that were not yet.

        at: called with the number of rows that are done. held_back: how many of the newest rows are left for later.
        """
        row, size, count = self.done, _SMALLEST_BLOCK, len(self.rows) - held_back
        eventful = np.append(np.flatnonzero(self.rows.eventful[:count]), count)
        while row < count:
            end = min(row + size, int(eventful[np.searchsorted(eventful, row)]))
            calm = self._scan_calm(row, end)
            if row < calm == end:
                row, size = end, min(2 * size, _LARGEST_BLOCK)
            elif calm > row:
                self._process(calm)
                row, size = calm + 1, max(_SMALLEST_BLOCK, calm - row)
            elif end - row > _SMALLEST_BLOCK:
                size = max(_SMALLEST_BLOCK, (end - row) // 4)
            else:
                end = max(end, row + 1)
                for each in range(row, end):
                    self._process(each)
                row, size = end, _SMALLEST_BLOCK
            self.done = row
            at(row)

    def verdict(self) -> Verdict:
        """Return the verdict on the log as a whole."""
        failure, trouble, log = self._failure, self._trouble, self.rows.log
        if trouble is not None and (failure is None or failure.cause == "amp_overflow"):
            self.first_nonfinite = None
            return trouble
        if log.empty_rows >= _EMPTY_ROWS and (failure is None or failure.cause == "amp_overflow"):
            # Rows without values have left their steps behind; they come as often as those before.
            first = self.rows.step(len(log) - 1).step + max(1, int(self.rows.gaps[-1]))
            return _without_values(first, log.empty_rows)
        if failure is None:
            gaps = self.rows.gaps[1:]
            apart = math.inf if log.by_epoch else float(np.median(gaps)) if len(gaps) else 1.0
            return verdict_on_finite_log(self.rows.step(len(log) - 1), log.norm, apart=apart, rules=self._rules)
        return _of_epochs(failure) if log.by_epoch else failure

    def _scan_calm(self, first: int, end: int) -> int:
        """Process the rows of a block without non-finite values up to the first with an event at once.

        Returns the row behind them: `first` if they must be processed one by one.
        """
        rows, part, detector = self.rows, slice(first, end), replace(self._detector)
        norms, losses = rows.norm[part], rows.loss[part]
        calm = detector.scan_calm(norms, losses, rows.rate[part], self._rules)
        if not calm or not self._faults.scan_calm(norms[:calm], losses[:calm], self._rules.faults):
            return first
        self._detector = detector
        return first + calm

    def _process(self, row: int) -> None:
        rows, rules, detector, faults = self.rows, self._rules, self._detector, self._faults
        step = rows.step(row)
        finite_before, climbing, diverging = detector.finite_ever, detector.climbing, faults.diverging
        if rows.restarts[row]:
            detector.reset()
        was_failing = detector.failing
        self.events += detector.update(
            attempt=0,
            sequence=step.sequence,
            step=step.step,
            norm=step.global_norm,
            loss=step.loss,
            rate=step.learning_rate,
            nonfinite=len(step.nonfinite),
            skipped=step.overflow,
            rules=rules,
        )
        building_up = detector.gradient.in_build_up
        exploded = detector.first_steps.exploded
        for change in faults.update(step, _UNSEEN, building_up=building_up, exploded=exploded, rules=rules.faults):
            if change.begins:
                self.verdicts.append(verdict_on_fault(change, 0, _MODEL))
                self._trouble = self._trouble or self.verdicts[-1]
        first = self._failure is None or self._failure.cause == "amp_overflow"
        if step.nonfinite and not was_failing and (first or self._every):
            verdict = diagnose(
                [rows.step(each) for each in range(max(0, row - _WINDOW_ROWS + 1), row + 1)],
                self.events,
                _BUFFER,
                _MODEL,
                apart=math.inf if rows.log.by_epoch else float(rows.gaps[row]) or 1,
                overflows=rows.overflows(row, scaled=first and self._failure is not None),
                finite_before=finite_before,
                climbing=climbing,
                diverging=diverging,
                rules=rules,
            )
            self.verdicts.append(verdict)
            if self._failure is None or (first and verdict.cause != "amp_overflow"):
                self._failure, self.first_nonfinite = verdict, row


def _without_values(step: int, rows: int) -> Verdict:
    verdict = make_verdict("unknown", attempt=0, step=step, evidence=[f"the last {rows} rows have neither of them"])
    summary = f"Neither loss nor gradient norm since step {step}: pandas, among others, writes NaN as nothing."
    return replace(verdict, summary=summary)


def _of_epochs(verdict: Verdict) -> Verdict:
    """Return the verdict on a log of epochs, which says so. It cannot name a batch."""
    step, epoch = f"step {verdict.first_bad_step}", f"epoch {verdict.first_bad_step}"
    evidence = [line.replace(step, epoch) for line in verdict.evidence if not line.startswith("the previous record")]
    return replace(
        verdict,
        summary=verdict.summary.replace(step, epoch),
        evidence=(*evidence, "each row is an epoch: it does not show the steps before"),
        try_=tuple(line for line in verdict.try_ if step not in line),
    )


def _bounded(values: Floats) -> Floats:
    """Do to all values what `records.steps.bounded` does to one."""
    with np.errstate(all="ignore"):
        cut = np.clip(values, -LARGEST, LARGEST)
        cut = np.where(np.abs(cut) >= 1 / LARGEST, cut, 0.0)
        return np.where(np.isfinite(values), cut, values)
