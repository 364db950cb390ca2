"""`foreshock diagnose`: a recorded log through the same detection and diagnosis as live steps."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock_collector.board import Board
from foreshock_collector.config import Parser
from foreshock_collector.detection import Detector, Event
from foreshock_collector.diagnosis import diagnose
from foreshock_collector.logs import LogError, Row, read_log
from foreshock_collector.rules import DEFAULT, Rules
from foreshock_collector.steps import ModelFacts, Step
from foreshock_collector.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a log shows."""

    log: tuple[Row, ...]
    events: tuple[Event, ...]
    """Their `sequence` counts data rows from 1."""
    verdict: Verdict
    """On the first failure; `healthy` without one."""
    first_nonfinite: int | None
    """Its data row, from 0."""


def replay(rows: Sequence[Row], rules: Rules = DEFAULT) -> Replay:
    """Take the rows through the detector, and diagnose the first row that is not finite. rows: at least one."""
    detector, board, model = Detector(rules=rules), Board(world_size=1, layers=0), ModelFacts()
    steps = [_step(number, row) for number, row in enumerate(rows)]
    events: list[Event] = []
    verdict, first = None, None
    for number, step in enumerate(steps):
        finite_before, climbing = detector.finite_ever, detector.climbing
        gap, last_gap = _gap(rows, number), _gap(rows, number - 1)
        if gap > rules.interval_change * last_gap or last_gap > rules.interval_change * gap > 0:
            detector.start_anew()
        events += detector.update(
            attempt=0,
            sequence=step.sequence,
            step=step.step,
            norm=step.global_norm,
            loss=step.loss,
            rate=step.learning_rate,
            nonfinite=len(step.nonfinite),
            overflow=step.overflow,
        )
        if verdict is None and step.nonfinite:
            seen = steps[: number + 1]
            apart = rows[number].step - rows[number - 1].step if number else 1
            verdict = diagnose(
                seen,
                events,
                board,
                model,
                finite_before=finite_before,
                climbing=climbing,
                apart=apart,
                rules=rules,
            )
            first = number
    verdict = verdict or diagnose(steps, events, board, model, finite_before=True, climbing=0)
    return Replay(log=tuple(rows), events=tuple(events), verdict=verdict, first_nonfinite=first)


def main(arguments: list[str]) -> int:
    """0: healthy; 1: trouble found; 2: a file cannot be read."""
    parser = Parser(
        prog="foreshock diagnose",
        description="What happened in a recorded training log, where it began, and what to try.",
        epilog="Reads CSV (step,loss,grad_norm[,lr]), JSON lines, trainer_state.json, TensorBoard events and Foreshock "
        "databases. Exit code 0: healthy, 1: trouble found, 2: a file cannot be read.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--run", default="", help="of a Foreshock database: this run, not the newest")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE=NUMBER",
        help="change a rule of detection: gradient.spike_z=8, recovered_after=100; see docs/detection.md",
    )
    parser.add_argument("--json", action="store_true", help="one object per file, one per line")
    try:
        options = parser.parse_args(arguments)
        rules = _rules(options.set)
    except ValueError as error:
        sys.stderr.write(f"foreshock diagnose: {error}\n")
        return 2
    code = 0
    for path in options.files:
        try:
            found = replay(read_log(path, run=options.run), rules)
        except LogError as error:
            sys.stderr.write(f"foreshock diagnose: {error}\n")
            code = 2
            continue
        code = max(code, int(_trouble(found)))
        sys.stdout.write(json.dumps(_as_json(path, found)) + "\n" if options.json else _as_text(path, found))
    return code


def _gap(rows: Sequence[Row], number: int) -> float:
    """Steps from the row before to this one; 0 where there is none before, or the log starts again."""
    return max(0.0, rows[number].step - rows[number - 1].step) if number > 0 else 0.0


def _rules(settings: Sequence[str]) -> Rules:
    """The defaults, changed by texts such as "gradient.spike_z=8". Raises `ValueError`."""
    rules = DEFAULT
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            value: Any = json.loads(text)
        except ValueError:
            raise ValueError(f"--set {setting}: RULE=NUMBER was expected, such as gradient.spike_z=8") from None
        for part in reversed(name.split(".")):
            value = {part: value}
        rules = rules.with_overrides(value)
    return rules


def _step(number: int, row: Row) -> Step:
    loss, norm = row.loss, row.norm
    return Step(
        attempt=0,
        sequence=number + 1,
        step=int(row.step) if math.isfinite(row.step) else number,
        wall_seconds=0.0,
        duration_seconds=None,
        learning_rate=math.nan if row.rate is None else row.rate,
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
    return found.verdict.cause != "healthy" or any(event.kind == "build_up" for event in found.events)


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
    lines += [f"  seen: {line}" for line in verdict.evidence]
    for event in found.events:
        if event.kind == "build_up" and event.value is not None and event.usual is not None:
            lines.append(f"  build-up from step {event.step}: norm {event.value:.3g}, usually {event.usual:.3g}")
    lines += [f"  try:  {line}" for line in verdict.try_]
    return "\n".join(lines) + "\n"
