"""`foreshock run --embedded`: a training command with a collector beside it, and what that has found in the end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock_collector.server import Server

_END_SECONDS = 10.0
"""Seconds to wait until runs have ended at the collector: a recorder reports within two of its last rank's end."""
_POLL_SECONDS = 0.1


def main(command: list[str]) -> int:
    """Run the command to its end and return its exit code; 127 if it cannot be started, 2 without the collector."""
    try:
        from foreshock_collector.server import Server
    except ModuleNotFoundError as error:
        extra = "of the extra `collector`: in a checkout, pip install '.[collector]'"
        sys.stderr.write(f"foreshock run --embedded: {error.name} is missing; it is part {extra}\n")
        return 2
    from foreshock_collector.config import Config

    with tempfile.TemporaryDirectory(prefix="foreshock-", ignore_cleanup_errors=True) as folder:
        config = Config(grpc_port=0, http_port=0, database=str(Path(folder) / "foreshock.db"), ack_seconds=0.25)
        try:
            return asyncio.run(_train(Server(config), command))
        except OSError as error:
            sys.stderr.write(f"foreshock run: cannot start {command[0]}: {error.strerror}\n")
            return 127


async def _train(server: Server, command: list[str]) -> int:
    async with server:
        environment = {**os.environ, "FORESHOCK_COLLECTOR": server.address, "FORESHOCK_URL": server.url}
        _print(f"page at {server.url}")
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        loop = asyncio.get_running_loop()
        # A terminal sends Ctrl-C to the command as well, and its end is still to be reported.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_signal_handler(signal.SIGTERM, process.terminate)
        code = await process.wait()
        await asyncio.to_thread(_report_all, server.url)
    return code if code >= 0 else 128 - code


def _report_all(url: str) -> None:
    """Print the outcome of each run, and write its report into the current folder."""
    from foreshock_collector.commands.client import ClientError

    try:
        runs = _ended_runs(url)
        for run in runs:
            _print(_outcome(url, run["run"]))
        if not runs:
            _print("no training was watched")
    except (ClientError, OSError) as error:
        _print(f"no report: {error}")


def _ended_runs(url: str) -> list[dict[str, Any]]:
    from foreshock_collector.commands.client import ask

    deadline = time.monotonic() + _END_SECONDS
    while True:
        runs: list[dict[str, Any]] = ask(url, "runs")["runs"]
        if all(run["state"] == "ended" for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(_POLL_SECONDS)


def _outcome(url: str, run: str) -> str:
    from foreshock_collector.commands.report import from_run
    from foreshock_collector.commands.report_page import as_page

    report = from_run(url, run)
    path = Path("foreshock-" + re.sub(r"[^\w.-]", "-", run) + ".html")
    path.write_text(as_page(report), encoding="utf-8")
    found = [verdict["summary"] for verdict in report.verdicts] or [report.healthy]
    return f"run {run}: {found[-1]} Report: {path}"


def _print(line: str) -> None:
    sys.stderr.write(f"foreshock: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
