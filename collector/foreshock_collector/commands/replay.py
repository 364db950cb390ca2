"""`foreshock diagnose`: runs the detection and diagnosis for live steps on a recorded log."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.commands.follow import follow
from foreshock_collector.commands.log_follower import LogFollower, ReplayRows
from foreshock_collector.commands.logs import Log, LogError, Row, find_logs, parse_columns, read_log
from foreshock_collector.commands.terminal import working
from foreshock_collector.config import Parser


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Holds the findings from one log."""

    log: Log
    events: tuple[Event, ...]
    """Detected events; `sequence` counts data rows from 1."""
    verdict: Verdict
    """Verdict on the first failure; `healthy` without one."""
    first_nonfinite: int | None
    """Data row of the first failure, counted from 0."""


def replay(rows: Log | Sequence[Row], rules: Rules = DEFAULT, *, at: Callable[[int], None] = lambda _: None) -> Replay:
    """Run detection on the rows and diagnose the first failure. Requires at least one row.

    Without a failure, the verdict may be a lasting fault, or an overflow that a scaler handled. at: called now and then
    with the number of rows that have been processed.
    """
    log = rows if isinstance(rows, Log) else Log.from_rows(rows)
    follower = LogFollower(ReplayRows(log, rules), rules)
    follower.follow(at)
    return Replay(
        log=log,
        events=tuple(follower.events),
        verdict=follower.verdict(),
        first_nonfinite=follower.first_nonfinite,
    )


def replay_file(path: Path, *, run: str = "", rules: Rules = DEFAULT, columns: dict[str, str] | None = None) -> Replay:
    """Read a log and replay it, showing progress on a terminal. Raises `LogError`."""
    now = f"reading {path}"

    def read(rows: int) -> None:
        nonlocal now
        now = f"reading {path}: {rows:,} rows"

    def at(row: int) -> None:
        nonlocal now
        now = f"{path}: row {row:,} of {len(log):,}"

    with working(lambda: now):
        log = read_log(path, run=run, columns=columns, at=read)
        return replay(log, rules, at=at)


def main(arguments: list[str]) -> int:
    """Return 0 if no trouble was found, 1 if some was, 2 if a file cannot be read or an internal error occurred."""
    parser = Parser(
        prog="foreshock diagnose",
        description="Diagnose a recorded training log: what happened, where it began, and what to try.",
        epilog="Reads tables, JSON, what training scripts print, TensorBoard events, MLflow's folders, and databases "
        "of trackio and Foreshock; docs/diagnose.md lists them. Exit code 0: no trouble found; 1: trouble found; 2: a "
        "file cannot be read, or an internal error.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help='a log, a folder of logs, or "-" for a pipe'
    )
    parser.add_argument(
        "--columns",
        type=parse_columns,
        default={},
        metavar="step=NAME,loss=NAME,norm=NAME,lr=NAME",
        help="name the columns to read, any of them; the others are found by meaning",
    )
    parser.add_argument(
        "--run", default="", help="run to read from a database (default: the newest) or a table with several"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE=NUMBER",
        help="change a detection rule: gradient.spike_z=8, recovered_after=100; see docs/configuration.md",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per file, one per line")
    parser.add_argument("--follow", action="store_true", help="watch a log that is being written, until Ctrl-C")
    try:
        options = parser.parse_args(arguments)
        rules = _rules(options.set)
        if options.follow and len(options.files) > 1:
            raise ValueError("--follow watches one file")
    except ValueError as error:
        sys.stderr.write(f"foreshock diagnose: {error}\n")
        return 2
    if options.follow:
        return _followed(options.files[0], rules, options.columns, as_json=options.json)
    code = 0
    for path in chain.from_iterable(map(find_logs, options.files)):
        try:
            found = replay_file(path, run=options.run, rules=rules, columns=options.columns)
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


def _followed(path: Path, rules: Rules, columns: dict[str, str], *, as_json: bool) -> int:
    try:
        return follow(path, rules, columns, as_json=as_json)
    except LogError as error:
        sys.stderr.write(f"foreshock diagnose: {error}\n")
    except Exception:
        sys.stderr.write(f"foreshock diagnose: {path}: internal error\n{traceback.format_exc()}")
    return 2


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


def _trouble(found: Replay) -> bool:
    # A log that is too short or too sparse shows none.
    shown = found.verdict.cause != "amp_overflow" and found.verdict.first_bad_step >= 0
    return shown or any(event.kind == "build_up" for event in found.events)


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
    log = found.log
    lines = [f"{path}: {len(log)} rows{', one per epoch' if log.by_epoch else ''}, {verdict.cause}"]
    if log.unread_lines:
        lines.append(f"  {log.unread_lines} lines could not be read and were left out")
    lines.append(f"  {verdict.summary}")
    lines += [f"  evidence: {line}" for line in verdict.evidence]
    for event in found.events:
        if event.kind == "build_up" and event.value is not None and event.usual is not None:
            lines.append(f"  build-up from step {event.step}: norm {event.value:.3g}, usually {event.usual:.3g}")
    lines += [f"  try: {line}" for line in verdict.try_]
    return "\n".join(lines) + "\n"
