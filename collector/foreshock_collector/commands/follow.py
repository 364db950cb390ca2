"""`foreshock diagnose --follow`: watches a log that is being written, and prints what the live service would report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from foreshock_collector.analysis.detection import Event
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.commands.log_follower import LogFollower, ReplayRows
from foreshock_collector.commands.logs.columns import ColumnBuilder, Log
from foreshock_collector.commands.logs.formats import log_errors, read_lines
from foreshock_collector.commands.logs.growing import opened_growing

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0
"""A gradient that overflows while the loss is finite is a GradScaler's, if another step follows within this time."""
_EVENTS = {
    "spike": "spike of the norm",
    "build_up": "build-up of the norm",
    "loss_spike": "spike of the loss",
    "nonfinite": "not finite",
    "recovered": "recovered",
}


def follow(
    path: Path,
    rules: Rules,
    columns: dict[str, str],
    *,
    as_json: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Print events and verdicts as they come, until the log ends or the user stops it.

    Return 1 if there was trouble, else 0. Raises `LogError`. wait: waits some seconds for more to be written.
    """
    watch = _Watch(rules, as_json=as_json)

    def idle() -> None:
        watch.idle(_POLL_SECONDS)
        wait(_POLL_SECONDS)

    builder = ColumnBuilder(str(path), columns)
    ending = ""
    with log_errors(path):
        try:
            while ending != "ended":
                with opened_growing(path, idle) as source:
                    builder = ColumnBuilder(str(path), columns)
                    for chunk in read_lines(source, builder):
                        builder.add(chunk)
                        watch.add(builder.take(watch.rows))
                    ending = source.ending
                watch.change_file()
        except KeyboardInterrupt:
            # That is how the user ends it.
            pass
        if not watch.rows:
            builder.names.check(str(path))
    watch.idle(_PATIENCE_SECONDS)
    return int(watch.trouble)


class _Watch:
    """Runs detection on the rows as they come, and prints what is new."""

    def __init__(self, rules: Rules, *, as_json: bool) -> None:
        self.trouble = False
        """Whether there was a build-up, or a verdict that is not benign."""
        self._rules, self._as_json = rules, as_json
        self._log: Log | None = None
        self._follower: LogFollower | None = None
        self._printed_events = self._printed_verdicts = 0
        self._idle_seconds = 0.0
        self._file_changed = False

    @property
    def rows(self) -> int:
        """Number of rows so far."""
        return 0 if self._log is None else len(self._log)

    def add(self, log: Log | None) -> None:
        """Add rows and print what they show."""
        if log is None:
            return
        self._idle_seconds = 0.0
        if self._file_changed and self._log is not None and log.step[0] < self._log.step[-1]:
            # Another training, or one that went back to a checkpoint, and not the rest of this one.
            self._log = self._follower = None
            self._printed_events = self._printed_verdicts = 0
        self._file_changed = False
        self._log = log if self._log is None else self._log.with_rows(log)
        rows = ReplayRows(self._log, self._rules)
        if self._follower is None:
            self._follower = LogFollower(rows, self._rules, every=True)
        self._follower.rows = rows
        self._follower.follow(held_back=self._undecided(rows))
        self._print()

    def change_file(self) -> None:
        """Expect another file: the rest of this log after a rotation, or a new log."""
        self._file_changed = True

    def idle(self, seconds: float) -> None:
        """Note that nothing was written for some time."""
        self._idle_seconds += seconds
        if self._follower is not None and self._idle_seconds >= _PATIENCE_SECONDS:
            self._follower.follow()
            self._print()

    def _undecided(self, rows: ReplayRows) -> int:
        """Count the newest rows that may be overflows of a GradScaler, which the next row shows."""
        overflowing = rows.nonfinite & ~np.isnan(rows.loss) & ~np.isinf(rows.loss)
        count = int(np.argmin(np.append(overflowing[::-1], False)))
        return count if count < self._rules.collapse_after else 0

    def _print(self) -> None:
        follower = self._follower
        assert follower is not None
        for event in follower.events[self._printed_events :]:
            self.trouble = self.trouble or event.kind == "build_up"
            self._write(_event_text(event), {"step": event.step, "kind": event.kind, "score": event.score})
        for verdict in follower.verdicts[self._printed_verdicts :]:
            self.trouble = self.trouble or verdict.cause != "amp_overflow"
            fields = {"cause": verdict.cause, "likely_root": verdict.likely_root, "confidence": verdict.confidence}
            text = {"summary": verdict.summary, "try": list(verdict.try_)}
            self._write(_verdict_text(verdict), {"step": verdict.first_bad_step, "verdict": fields | text})
        self._printed_events, self._printed_verdicts = len(follower.events), len(follower.verdicts)
        sys.stdout.flush()

    def _write(self, text: str, fields: dict[str, Any]) -> None:
        sys.stdout.write((json.dumps(fields, allow_nan=False) if self._as_json else text) + "\n")


def _event_text(event: Event) -> str:
    value = "" if event.value is None or event.usual is None else f": {event.value:.3g}, usually {event.usual:.3g}"
    return f"step {event.step}: {_EVENTS[event.kind]}{value}"


def _verdict_text(verdict: Verdict) -> str:
    lines = [f"{verdict.cause}: {verdict.summary}"]
    lines += [f"  evidence: {line}" for line in verdict.evidence]
    lines += [f"  try: {line}" for line in verdict.try_]
    return "\n".join(lines)
