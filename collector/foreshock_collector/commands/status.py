"""`foreshock status` and `foreshock incidents`: the state of a collector's runs, for people and for scripts."""

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
from foreshock_collector.commands.verdict_text import verdict_table
from foreshock_collector.config import ConfigError, Parser

_TROUBLE = frozenset({"failing", "failed", "stalled", "ranks missing"})
"""Conditions that make `foreshock status` exit with 1. A build-up is only a warning: most runs survive it."""
_RECENT_SECONDS = 86400
"""How long ended runs are listed: an old failure must not keep the exit code at 1 forever."""


def status(arguments: list[str]) -> int:
    """Show all runs or one. Return 1 if a listed run is in trouble, 2 without an answer or without such a run."""
    parser = Parser(
        prog="foreshock status",
        description="Show what the runs are doing.",
        epilog="Exit code 1: a listed run is failing, failed, stalled or missing ranks; 2: no answer, or no such run; "
        "otherwise 0.",
    )
    parser.add_argument("run", nargs="?", help="show only this run, in full")
    parser.add_argument("--all", action="store_true", help="include runs that ended more than a day ago")
    parser.add_argument("--json", action="store_true", help="print the API's answer")
    add_url(parser)
    return _show(parser, arguments, _status)


def incidents(arguments: list[str]) -> int:
    """Show incidents of all runs or one. Return 2 without an answer or without such a run."""
    parser = Parser(prog="foreshock incidents", description="Show what went wrong, newest first.")
    parser.add_argument("run", nargs="?", help="show only this run's incidents, in full")
    parser.add_argument("--json", action="store_true", help="print one JSON object per incident, one per line")
    add_url(parser)
    return _show(parser, arguments, _incidents)


def _show(parser: Parser, arguments: list[str], command: Callable[[Any, Console], int]) -> int:
    console = terminal()
    try:
        with console.capture() as captured:
            code = command(parser.parse_args(arguments), console)
    except (ClientError, ConfigError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    # Tables pad their cells. Strip the padding at the ends of lines, which people copy.
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    return code


def _status(options: Any, console: Console) -> int:
    if options.run:
        answer = ask(options.url, "runs", options.run)
        runs = [answer]
    else:
        answer = ask(options.url, "runs", **({} if options.all else {"ended_within": _RECENT_SECONDS}))
        runs = answer["runs"]
    code = int(any(run["condition"] in _TROUBLE for run in runs))
    if options.json:
        sys.stdout.write(json.dumps(answer) + "\n")
        return code
    older = 0 if options.run else answer["ended"] - sum(run["state"] == "ended" for run in runs)
    if runs:
        console.print(_runs(runs))
    elif not older:
        console.print("no runs yet")
    if older:
        console.print(f"{older} run{'s' if older > 1 else ''} ended more than a day ago; list with --all")
    for run in runs:
        if run["errors"]:
            stages = ", ".join(f"{stage} {count}" for stage, count in run["errors"].items())
            console.print(Text(f"{run['run']}: internal errors in the collector, see its log: {stages}"))
    if options.run:
        _ranks(console, answer["ranks"])
        _verdicts(console, answer["incidents"])
    return code


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
        # Most runs have no incidents and need no query.
        if run.get("verdict") != "healthy"
        for incident in ask(options.url, "runs", run["run"])["incidents"]
    ]
    found.sort(key=lambda incident: -incident["opened_seconds"])
    if options.json:
        sys.stdout.write("".join(json.dumps(incident) + "\n" for incident in found))
    elif not found:
        console.print("no incidents")
    elif options.run:
        _verdicts(console, found)
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
    """Return a table whose widest columns wrap on a narrow terminal; nothing is truncated."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _ranks(console: Console, ranks: Sequence[dict[str, Any]]) -> None:
    for rank in ranks:
        line = Text(f"rank {rank['rank']} on {rank['node']}: {rank['state']}, last step {rank['last_step']}")
        console.print(line.append(f", {rank['detail']}") if rank["detail"] else line)


def _verdicts(console: Console, found: Sequence[dict[str, Any]]) -> None:
    for incident in found:
        console.print(Text(f"incident {incident['id']}, attempt {incident['attempt']}", "bold"))
        console.print(Padding(verdict_table(incident["verdict"]), (0, 0, 1, 2), expand=False))
