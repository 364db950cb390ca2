"""`foreshock diagnose`: runs the detection and diagnosis for live steps on a recorded log."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.diagnosis import diagnose
from foreshock_collector.analysis.fault_verdicts import verdict_on_fault
from foreshock_collector.analysis.faults import FaultDetector, StepSignals
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.commands.logs import LogError, Row, read_log
from foreshock_collector.commands.terminal import working
from foreshock_collector.config import Parser
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts, Step, bounded

_BUFFER, _MODEL = RecordBuffer(world_size=1, layers=0), ModelFacts()
_UNSEEN = StepSignals(math.nan, math.nan, -1, math.nan)
"""A log contains no ranks or layers."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Holds the findings from one log."""

    log: tuple[Row, ...]
    events: tuple[Event, ...]
    """Detected events; `sequence` counts data rows from 1."""
    verdict: Verdict
    """Verdict on the first failure; `healthy` without one."""
    first_nonfinite: int | None
    """Data row of the first failure, counted from 0."""


def replay(rows: Sequence[Row], rules: Rules = DEFAULT, *, at: Callable[[int], None] = lambda _: None) -> Replay:
    """Run detection on the rows and diagnose the first failure. Requires at least one row.

    Without a failure, the verdict may be a lasting fault, or an overflow that a scaler handled. at: called with the
    number of each row, from 0, before it is processed.
    """
    detector, faults = Detector(), FaultDetector()
    steps = [_step(number, row) for number, row in enumerate(rows)]
    events: list[Event] = []
    failure: tuple[Verdict, int] | None = None
    trouble: Verdict | None = None
    for number, step in enumerate(steps):
        at(number)
        finite_before, climbing, diverging = detector.finite_ever, detector.climbing, faults.diverging
        gap, last_gap = _gap(rows, number), _gap(rows, number - 1)
        if gap > rules.interval_change * last_gap > 0 or last_gap > rules.interval_change * gap > 0:
            detector.reset()
        was_failing = detector.failing
        events += detector.update(
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
        for change in faults.update(step, _UNSEEN, building_up=building_up, rules=rules.faults):
            if change.begins and trouble is None:
                trouble = verdict_on_fault(change, 0, _MODEL)
        benign = failure is not None and failure[0].cause == "amp_overflow"
        if step.nonfinite and not was_failing and (failure is None or benign):
            verdict = diagnose(
                steps[: number + 1],
                events,
                _BUFFER,
                _MODEL,
                apart=gap or 1,
                overflows=_overflows(steps, number),
                finite_before=finite_before,
                climbing=climbing,
                diverging=diverging,
                rules=rules,
            )
            failure = failure if benign and verdict.cause == "amp_overflow" else (verdict, number)
    if trouble is not None and (failure is None or failure[0].cause == "amp_overflow"):
        return Replay(log=tuple(rows), events=tuple(events), verdict=trouble, first_nonfinite=None)
    verdict = failure[0] if failure else diagnose(steps, events, _BUFFER, _MODEL, finite_before=True, climbing=0)
    return Replay(log=tuple(rows), events=tuple(events), verdict=verdict, first_nonfinite=failure and failure[1])


def replay_file(path: Path, *, run: str = "", rules: Rules = DEFAULT) -> Replay:
    """Read a log and replay it, showing progress on a terminal. Raises `LogError`."""
    now = f"reading {path}"

    def at(row: int) -> None:
        nonlocal now
        now = f"{path}: row {row + 1:,} of {len(rows):,}"

    with working(lambda: now):
        rows = read_log(path, run=run)
        return replay(rows, rules, at=at)


def main(arguments: list[str]) -> int:
    """Return 0 if healthy, 1 if trouble was found, 2 if a file cannot be read or an internal error occurred."""
    parser = Parser(
        prog="foreshock diagnose",
        description="Diagnose a recorded training log: what happened, where it began, and what to try.",
        epilog="Reads CSV (step,loss,grad_norm[,lr]), JSON lines, trainer_state.json, TensorBoard events and Foreshock "
        "databases. Exit code 0: healthy; 1: trouble found; 2: a file cannot be read, or an internal error.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--run", default="", help="run to read from a Foreshock database (default: the newest)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE=NUMBER",
        help="change a detection rule: gradient.spike_z=8, recovered_after=100; see docs/configuration.md",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per file, one per line")
    try:
        options = parser.parse_args(arguments)
        rules = _rules(options.set)
    except ValueError as error:
        sys.stderr.write(f"foreshock diagnose: {error}\n")
        return 2
    code = 0
    for path in options.files:
        try:
            found = replay_file(path, run=options.run, rules=rules)
            text = json.dumps(_as_json(path, found), allow_nan=False) + "\n" if options.json else _as_text(path, found)
        except LogError as error:
            sys.stderr.write(f"foreshock diagnose: {error}\n")
            code = 2
        except Exception:
            # An uncaught error would exit with 1, which means trouble in the training.
            sys.stderr.write(f"foreshock diagnose: {path}: internal error\n{traceback.format_exc()}")
            code = 2
        else:
            code = max(code, int(_trouble(found)))
            sys.stdout.write(text)
    return code


def _overflows(steps: Sequence[Step], first: int) -> int:
    """Count consecutive non-finite gradients from `first` on, if losses are finite and training continues; else 0."""
    for number in range(first, len(steps)):
        step = steps[number]
        if step.nan_loss or step.inf_loss or step.loss is None:
            return 0
        if not step.nonfinite:
            return number - first
    # The log ends here. One such step proves nothing; a scaler must have skipped many with a finite loss.
    return len(steps) - first if len(steps) - first >= DEFAULT.collapse_after else 0


def _gap(rows: Sequence[Row], number: int) -> float:
    """Return the steps between the previous row and this one; 0 for the first row, or if the log restarts."""
    return max(0.0, rows[number].step - rows[number - 1].step) if number > 0 else 0.0


def _rules(settings: Sequence[str]) -> Rules:
    """Apply settings such as "gradient.spike_z=8" to the default rules. Raises `ValueError`."""
    rules = DEFAULT
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            value: Any = json.loads(text)
        except ValueError:
            raise ValueError(f"--set {setting}: expected RULE=NUMBER, such as gradient.spike_z=8") from None
        for part in reversed(name.split(".")):
            value = {part: value}
        rules = rules.with_overrides(value)
    return rules


def _step(number: int, row: Row) -> Step:
    loss, norm = (None if value is None else bounded(value) for value in (row.loss, row.norm))
    return Step(
        attempt=0,
        sequence=number + 1,
        step=int(row.step) if math.isfinite(row.step) else number,
        wall_seconds=0.0,
        duration_seconds=None,
        learning_rate=math.nan if row.rate is None else bounded(row.rate),
        loss=loss,
        loss_scale=1.0,
        global_norm=math.nan if norm is None else norm,
        clip_coefficient=1.0,
        skipped=False,
        nan_loss=loss is not None and math.isnan(loss),
        inf_loss=loss is not None and math.isinf(loss),
        nan_gradient=norm is not None and math.isnan(norm),
        inf_gradient=norm is not None and math.isinf(norm),
        ranks=1,
    )


def _trouble(found: Replay) -> bool:
    return found.verdict.cause not in ("healthy", "amp_overflow") or any(
        event.kind == "build_up" for event in found.events
    )


def _as_json(path: Path, found: Replay) -> dict[str, Any]:
    verdict, first = found.verdict, found.first_nonfinite
    return {
        "file": str(path),
        "rows": len(found.log),
        "events": [
            {"row": event.sequence - 1, "step": event.step, "kind": event.kind, "score": event.score}
            for event in found.events
        ],
        "verdict": {
            "cause": verdict.cause,
            "likely_root": verdict.likely_root,
            "first_nonfinite_row": first,
            "lead_rows": None if first is None else verdict.lead_steps,
            "confidence": verdict.confidence,
            "summary": verdict.summary,
            "try": list(verdict.try_),
        },
    }


def _as_text(path: Path, found: Replay) -> str:
    verdict = found.verdict
    lines = [f"{path}: {len(found.log)} rows, {verdict.cause}", f"  {verdict.summary}"]
    lines += [f"  evidence: {line}" for line in verdict.evidence]
    for event in found.events:
        if event.kind == "build_up" and event.value is not None and event.usual is not None:
            lines.append(f"  build-up from step {event.step}: norm {event.value:.3g}, usually {event.usual:.3g}")
    lines += [f"  try: {line}" for line in verdict.try_]
    return "\n".join(lines) + "\n"
