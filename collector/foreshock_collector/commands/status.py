"""`foreshock status` and `foreshock incidents`: what a collector knows, for people and for scripts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foreshock_collector.commands.client import ClientError, add_url, ask
from foreshock_collector.commands.terminal import shown, terminal
from foreshock_collector.commands.verdict_text import story
from foreshock_collector.config import ConfigError, Parser

_TROUBLE = frozenset({"failing", "failed", "stalled", "ranks missing"})
"""Conditions that make `foreshock status` exit with 1. A build-up is a warning: most runs survive it."""
_RECENT_SECONDS = 86400.0
"""Ended runs are listed for a day: an old failure must not keep the exit code at 1 for ever."""


def status(arguments: list[str]) -> int:
    """Show the runs, or one. 1: a run that is shown is in trouble; 2: no answer, or no such run."""
    parser = Parser(
        prog="foreshock status",
        description="What the runs are doing.",
        epilog="Exit code 1: a run that is shown is failing, failed or stalled, or misses ranks; 2: no answer, or no "
        "such run; else 0.",
    )
    parser.add_argument("run", nargs="?", help="only this run, in full")
    parser.add_argument("--all", action="store_true", help="also runs that ended more than a day ago")
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


def _show(parser: Parser, arguments: list[str], command: Callable[[Any, Console], int]) -> int:
    console = terminal()
    try:
        with console.capture() as told:
            code = command(parser.parse_args(arguments), console)
    except (ClientError, ConfigError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    # Tables fill their cells up with blanks: of no use at the end of a line that somebody copies.
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in told.get().splitlines())
    return code


def _status(options: Any, console: Console) -> int:
    answer = ask(options.url, "runs", *([options.run] if options.run else []))
    runs = [answer] if options.run else answer["runs"]
    if not (options.run or options.all):
        runs = [run for run in runs if run["state"] == "active" or _age(run, answer) < _RECENT_SECONDS]
    code = int(any(run["condition"] in _TROUBLE for run in runs))
    if options.json:
        sys.stdout.write(json.dumps(answer if options.run else {**answer, "runs": runs}) + "\n")
        return code
    older = 0 if options.run else len(answer["runs"]) - len(runs)
    if runs:
        console.print(_runs(runs))
    elif not older:
        console.print("no runs yet")
    if older:
        console.print(f"{older} run{'s' if older > 1 else ''} ended more than a day ago: --all")
    for run in runs:
        if run["errors"]:
            stages = ", ".join(f"{stage} {count}" for stage, count in run["errors"].items())
            console.print(Text(f"{run['run']}: errors inside the collector, see its log: {stages}"))
    if options.run:
        _ranks(console, answer["ranks"])
        _stories(console, answer["incidents"])
    return code


def _age(run: dict[str, Any], answer: dict[str, Any]) -> float:
    return float(answer["now_seconds"] - run["last_report_seconds"])


def _runs(runs: Sequence[dict[str, Any]]) -> Table:
    table = _table("run", "condition", "step", "loss", "global norm", "ranks", "last verdict")
    for run in runs:
        newest = run["newest"]
        table.add_row(
            Text(run["run"]),
            run["condition"],
            f"{newest['step']:.0f}" if "step" in newest else "-",
            shown(newest.get("loss"), newest.get("loss_nonfinite", "")),
            shown(newest.get("global_norm"), newest.get("gradient_nonfinite", "")),
            f"{run['ranks_reporting']}/{run['world_size']}",
            run["verdict"],
        )
    return table


def _incidents(options: Any, console: Console) -> int:
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
        table = _table("opened", "run", "verdict", "step", "lead", "rank", "layer", "open")
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
    return 0


def _table(*columns: str) -> Table:
    """Where a terminal is narrow the widest columns fold, and nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _ranks(console: Console, ranks: Sequence[dict[str, Any]]) -> None:
    for rank in ranks:
        line = Text(f"rank {rank['rank']} on {rank['node']}: {rank['state']}, last step {rank['last_step']}")
        console.print(line.append(f", {rank['detail']}") if rank["detail"] else line)


def _stories(console: Console, found: Sequence[dict[str, Any]]) -> None:
    for incident in found:
        console.print(Text(f"incident {incident['id']}, attempt {incident['attempt']}", "bold"))
        console.print(Padding(story(incident["verdict"]), (0, 0, 1, 2), expand=False))
