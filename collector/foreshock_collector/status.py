"""`foreshock status` and `foreshock incidents`: what a collector knows, for people and for scripts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foreshock_collector.client import ClientError, add_url, ask
from foreshock_collector.config import ConfigError, Parser
from foreshock_collector.story import story


def status(arguments: list[str]) -> int:
    """Show the runs, or one. 2: no answer, or no such run."""
    parser = Parser(prog="foreshock status", description="What the runs are doing.")
    parser.add_argument("run", nargs="?", help="only this run, in full")
    parser.add_argument("--json", action="store_true", help="as the API says it")
    add_url(parser)
    return _show(parser, arguments, _status)


def incidents(arguments: list[str]) -> int:
    """Show incidents of all runs, or of one. 2: no answer, or no such run."""
    parser = Parser(prog="foreshock incidents", description="What went wrong, newest first.")
    parser.add_argument("run", nargs="?", help="only this run, each in full")
    parser.add_argument("--json", action="store_true", help="one object per incident, one per line")
    add_url(parser)
    return _show(parser, arguments, _incidents)


def _show(parser: Parser, arguments: list[str], command: Callable[[Any, Console], None]) -> int:
    try:
        console = Console(no_color=True if "NO_COLOR" in os.environ else None, highlight=False)
        command(parser.parse_args(arguments), console)
    except (ClientError, ConfigError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return 0


def _status(options: Any, console: Console) -> None:
    answer = ask(options.url, "runs", *([options.run] if options.run else []))
    if options.json:
        sys.stdout.write(json.dumps(answer) + "\n")
        return
    runs = [answer] if options.run else answer["runs"]
    if not runs:
        console.print("no runs yet")
        return
    table = Table("run", "state", "step", "loss", "global norm", "ranks", "verdict")
    for run in runs:
        newest, ranks = run["newest"], f"{run['ranks_reporting']}/{run['world_size']}"
        loss, norm = (f"{newest[name]:.4g}" if name in newest else "-" for name in ("loss", "global_norm"))
        step = f"{newest['step']:.0f}" if "step" in newest else "-"
        table.add_row(Text(run["run"]), run["state"], step, loss, norm, ranks, run["verdict"])
    console.print(table)
    if options.run:
        _ranks(console, answer["ranks"])
        _stories(console, answer["incidents"])


def _incidents(options: Any, console: Console) -> None:
    runs = [{"run": options.run}] if options.run else ask(options.url, "runs")["runs"]
    found = [
        {"run": run["run"], **incident}
        for run in runs
        # Most runs have none: those need not be asked.
        if run.get("verdict") != "healthy"
        for incident in ask(options.url, "runs", run["run"])["incidents"]
    ]
    found.sort(key=lambda incident: -incident["opened_seconds"])
    if options.json:
        sys.stdout.write("".join(json.dumps(incident) + "\n" for incident in found))
    elif not found:
        console.print("no incidents")
    elif options.run:
        _stories(console, found)
    else:
        table = Table("opened", "run", "verdict", "step", "lead", "rank", "layer", "open")
        for incident in found:
            verdict = incident["verdict"]
            table.add_row(
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident["opened_seconds"])),
                Text(incident["run"]),
                verdict["cause"],
                str(verdict["first_bad_step"]),
                str(verdict["lead_steps"]),
                "-" if verdict["rank"] is None else str(verdict["rank"]),
                Text(verdict["layer"] or "-"),
                "yes" if incident["closed_seconds"] is None else "no",
            )
        console.print(table)


def _ranks(console: Console, ranks: Sequence[dict[str, Any]]) -> None:
    for rank in ranks:
        line = Text(f"rank {rank['rank']} on {rank['node']}: {rank['state']}, last step {rank['last_step']}")
        console.print(line.append(f", {rank['detail']}") if rank["detail"] else line)


def _stories(console: Console, found: Sequence[dict[str, Any]]) -> None:
    for incident in found:
        console.print(Text(f"incident {incident['id']}, attempt {incident['attempt']}", "bold"))
        console.print(Padding(story(incident["verdict"]), (0, 0, 1, 2)))
