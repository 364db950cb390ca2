"""`foreshock report`: one run or recorded log as a self-contained page, or as Markdown for an issue tracker."""

from __future__ import annotations

import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from foreshock_collector.commands.client import ClientError, add_url, ask
from foreshock_collector.commands.logs import LogError
from foreshock_collector.commands.logs.columns import values_or_none
from foreshock_collector.commands.replay import Replay, replay_file
from foreshock_collector.commands.report_page import Report, as_markdown, as_page
from foreshock_collector.config import ConfigError, Parser
from foreshock_collector.web.answers import verdict_answer

_BEFORE, _AFTER = 96, 16
"""Steps around an incident that the heat maps show."""


def main(arguments: list[str]) -> int:
    """Write the report. Return 2 if the run or file does not exist or cannot be read."""
    parser = Parser(prog="foreshock report", description="Write a run or a recorded log as one self-contained page.")
    parser.add_argument("source", metavar="RUN|FILE", help="a file if there is one of this name, else a run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it; default: standard output")
    parser.add_argument("--markdown", action="store_true", help="write text for an issue tracker, without charts")
    add_url(parser)
    try:
        options = parser.parse_args(arguments)
        path = Path(options.source)
        report = from_log(path, replay_file(path)) if path.exists() else from_run(options.url, options.source)
        text = as_markdown(report) if options.markdown else as_page(report)
        if options.output is None:
            sys.stdout.write(text)
        else:
            options.output.write_text(text, encoding="utf-8")
    except (ClientError, ConfigError, LogError, OSError) as error:
        sys.stderr.write(f"foreshock report: {error}\n")
        return 2
    return 0


def from_log(path: Path, found: Replay) -> Report:
    """Report on a recorded log."""
    log = found.log
    columns: dict[str, list[Any]] = {
        "step": log.step.tolist(),
        "loss": values_or_none(log.loss, log.loss_logged),
        "global_norm": values_or_none(log.norm, log.norm_logged),
        "learning_rate": values_or_none(log.rate, ~np.isnan(log.rate)),
    }
    events = [{"kind": event.kind, "step": event.step} for event in found.events]
    verdicts = [] if found.verdict.cause == "healthy" else [verdict_answer(found.verdict)]
    return Report(
        title=path.name,
        columns=columns,
        events=events,
        verdicts=verdicts,
        heat={},
        details=[("rows", f"{len(found.log):,}, from a recorded log, which does not show ranks, layers or model")],
        healthy=f"No incidents: {len(found.log):,} rows, all finite.",
    )


def from_run(url: str, name: str) -> Report:
    """Report on a run of a collector. Raises `ClientError`."""
    run = ask(url, "runs", name)
    series = ask(url, "runs", name, "series", points=2000)
    verdicts = [incident["verdict"] for incident in run["incidents"]]
    events = [event for event in run["events"] if event["attempt"] == run["attempt"]]
    heat = {}
    if verdicts and verdicts[-1]["attempt"] == run["attempt"]:
        bad = next((e["sequence"] for e in reversed(events) if e["kind"] == "nonfinite"), series["newest"])
        for by in ("ranks", "layers"):
            cells = ask(url, "runs", name, "heat", by, first=max(1, bad - _BEFORE), last=bad + _AFTER, columns=2000)
            if cells["values"]:
                # Sequence numbers start at 1; the report has the script's own step numbers.
                shift = verdicts[-1]["first_bad_step"] - bad
                steps = [sequence + shift for sequence in cells["sequence"]]
                heat[by] = {"steps": steps, "rows": cells["rows"], "values": cells["values"]}
    return Report(
        title=name,
        columns=series,
        events=events,
        verdicts=verdicts,
        heat=heat,
        details=_details(run, url),
        healthy=_healthy(run["counters"]),
        runbooks=f"{url.rstrip('/')}/runbooks",
    )


def _details(run: dict[str, Any], url: str) -> list[tuple[str, str]]:
    model, optimizer, attempts = run["model"], run["optimizer"], len(run["attempts"])
    ended = max(run["last_step_seconds"], run["last_report_seconds"])
    size = f"{len(model['layers'])} layers, {model['elements']:,} elements in {model['parameters']:,} parameters"
    facts = [
        ("experiment", run["experiment"]),
        ("condition", run["condition"]),
        ("attempt", f"{run['attempt']}, the newest of {attempts}" if attempts > 1 else f"{run['attempt']}"),
        ("ranks", _ranks(run)),
        ("model", f"{model['type']}, {size}" if model["type"] else ""),
        ("optimizer", optimizer["type"] + (", fused" if optimizer["fused"] else "")),
        ("clip", run["clip"]),
        ("started", _utc(run["started_seconds"]) if run["started_seconds"] else ""),
        ("duration", _duration(ended - run["started_seconds"]) if run["started_seconds"] else ""),
        ("last report", _utc(run["last_report_seconds"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))),
        ("page", f"{url.rstrip('/')}/run/{urllib.parse.quote(run['run'], safe='')}"),
    ]
    return [(name, value) for name, value in facts if value]


def _ranks(run: dict[str, Any]) -> str:
    reporting, expected = run["ranks_reporting"], run["world_size"]
    if run["state"] == "active":
        return f"{reporting} of {expected} reporting"
    return f"{expected}" if reporting == expected else f"{expected}, {expected - reporting} of them exited unexpectedly"


def _healthy(counters: dict[str, Any]) -> str:
    nonfinite = [f"{kind} {count:,}" for kind, count in counters["nonfinite"].items() if count]
    values = f"not all finite ({', '.join(nonfinite)}), without harm" if nonfinite else "all finite"
    return f"No incidents: {counters['steps']:,} steps, {values}."


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
