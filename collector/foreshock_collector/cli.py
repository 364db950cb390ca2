"""The commands that come with the collector: `collector`, `status`, `demo`, `diagnose`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from foreshock_collector.config import ConfigError, Parser, config_from
from foreshock_protos import DEFAULT_HTTP_PORT


def collector(arguments: list[str]) -> int:
    """Serve until told to stop. 2: a setting is wrong."""
    from foreshock_collector.server import serve
    from foreshock_collector.store import StoreError

    try:
        asyncio.run(serve(config_from(arguments)))
    except (ConfigError, StoreError) as error:
        sys.stderr.write(f"foreshock collector: {error}\n")
        return 2
    return 0


def demo(arguments: list[str]) -> int:
    """Show a real training job explode, survive and meet a bad batch; see `foreshock_collector.demo`."""
    from foreshock_collector.demo.command import main

    return main(arguments)


def diagnose(arguments: list[str]) -> int:
    """Name what happened in recorded logs; see `foreshock_collector.replay`."""
    from foreshock_collector.replay import main

    return main(arguments)


def status(arguments: list[str]) -> int:
    """Show the runs, or one. 2: no answer, or no such run."""
    parser = Parser(prog="foreshock status", description="What the runs are doing.")
    parser.add_argument("run", nargs="?", help="only this run, in full")
    parser.add_argument("--json", action="store_true", help="as the API says it")
    default = os.environ.get("FORESHOCK_URL", f"http://127.0.0.1:{DEFAULT_HTTP_PORT}")
    parser.add_argument("--url", default=default, help="the collector's HTTP address (default: %(default)s)")
    try:
        options = parser.parse_args(arguments)
    except ConfigError as error:
        sys.stderr.write(f"foreshock status: {error}\n")
        return 2
    path = "/api/v1/runs" + (f"/{urllib.parse.quote(options.run, safe='')}" if options.run else "")
    try:
        with urllib.request.urlopen(options.url.rstrip("/") + path, timeout=10) as response:  # noqa: S310
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        text = json.load(error).get("error", error.reason) if error.code == 404 else error.reason
        sys.stderr.write(f"foreshock status: {text}\n")
        return 2
    except (OSError, ValueError) as error:
        sys.stderr.write(f"foreshock status: no collector at {options.url}: {error}\n")
        return 2
    if options.json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        _show([answer] if options.run else answer["runs"], full=bool(options.run))
    return 0


def _show(runs: list[dict[str, Any]], *, full: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(no_color=True if "NO_COLOR" in os.environ else None)
    table = Table("run", "state", "step", "loss", "global norm", "verdict", title="Runs" if not full else None)
    for run in runs:
        newest = run["newest"]
        numbers = [f"{newest[name]:.4g}" if name in newest else "-" for name in ("step", "loss", "global_norm")]
        table.add_row(run["run"], run["state"], *numbers, run["verdict"])
    console.print(table)
    for run in runs if full else []:
        for rank in run["ranks"]:
            console.print(f"rank {rank['rank']} on {rank['node']}: {rank['state']}, step {rank['last_step']}")
        for incident in run["incidents"]:
            verdict = incident["verdict"]
            console.print(f"incident {incident['id']}: {verdict['summary']}", markup=False)
            for line in verdict["evidence"]:
                console.print(f"  seen: {line}", markup=False)
            for line in verdict["try"]:
                console.print(f"  try:  {line}", markup=False)
