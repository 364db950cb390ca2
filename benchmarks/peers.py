"""Other programs that diagnose training logs, on the logs of the fault corpus, next to `foreshock diagnose`.

They run in an environment of their own, and see what a script's log would hold: step, loss, norm and learning rate.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay


class Peer(NamedTuple):
    """A program that diagnoses one log at a time and prints JSON."""

    name: str
    arguments: tuple[str, ...]
    severe: str
    """Severity of findings that it takes for trouble; lesser ones are hints."""


PEERS = (
    Peer("losslint", ("check", "--format", "json"), "error"),
    Peer("runmedic", ("diagnose", "--json"), "critical"),
    Peer("trainspotter", ("analyze", "--output", "json"), "error"),
)
_DRIVER = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(sys.argv[1] + ".cli").main
for path in sys.stdin.read().splitlines():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main([*sys.argv[2:], path])
    print(json.dumps(out.getvalue()))
"""
"""Calls the program's own command once for each path; starting it for each would take minutes."""


class Log(NamedTuple):
    """One log, and what is right about it."""

    rows: Sequence[Row]
    kind: str
    """"climb": ends right before its first non-finite row; "cold": right after the third step of an explosion; "whole":
    a complete log."""
    trouble: bool
    """Whether something is wrong with it that a log can show."""


def compare(python: Path, logs: Sequence[Log]) -> dict[str, dict[str, float]]:
    """Return the figures of each program. python: of the environment that they are installed in."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [_written(Path(folder) / f"{number}.csv", log.rows) for number, log in enumerate(logs)]
        found = {"foreshock diagnose": [_ours(log.rows) for log in logs]}
        found |= {peer.name: [*_findings(python, peer, paths)] for peer in PEERS}
    return {name: _figures(logs, counts) for name, counts in found.items()}


def _figures(logs: Sequence[Log], counts: Sequence[int]) -> dict[str, float]:
    """counts: severe findings in each log."""
    seen: Counter[str] = Counter()
    for log, count in zip(logs, counts, strict=True):
        if log.kind == "whole":
            seen["right"] += (count > 0) == log.trouble
            seen["whole"] += 1
            if not log.trouble:
                seen["false"] += count
                seen["calm rows"] += len(log.rows)
        else:
            seen[log.kind] += count > 0
    return {
        "warned": seen["climb"],
        "cold_warned": seen["cold"],
        "right": seen["right"],
        "of": seen["whole"],
        "alarms_per_10000_calm_steps": 1e4 * seen["false"] / max(1, seen["calm rows"]),
    }


def _ours(rows: Sequence[Row]) -> int:
    found = replay(rows)
    alerts = sum(event.kind == "build_up" for event in found.events)
    return alerts + (found.verdict.cause not in ("healthy", "amp_overflow", "unknown"))


def _findings(python: Path, peer: Peer, paths: Sequence[Path]) -> Iterator[int]:
    command = [str(python), "-c", _DRIVER, peer.name, *peer.arguments]
    done = subprocess.run(command, input="\n".join(map(str, paths)), capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        text = json.loads(line)
        yield _severe(json.loads(text), peer.severe) if text.strip() else 0


def _severe(answer: Any, severity: str) -> int:
    """Count the findings of a severity, wherever they lie in the answer."""
    if isinstance(answer, list):
        return sum(_severe(each, severity) for each in answer)
    if isinstance(answer, dict):
        return (answer.get("severity") == severity) + sum(_severe(each, severity) for each in answer.values())
    return 0


def _written(path: Path, rows: Sequence[Row]) -> Path:
    lines = [
        ",".join("" if value is None else repr(value) for value in (row.step, row.loss, row.norm, row.rate))
        for row in rows
    ]
    path.write_text("\n".join(["step,loss,grad_norm,lr", *lines, ""]))
    return path
