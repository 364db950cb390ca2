"""Runs Python interpreters as a rank runs its recorder."""

from __future__ import annotations

import os
import subprocess


def run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text. Raises `OSError` and `subprocess.TimeoutExpired`.

    seconds: longest time that it may take. No module in the current folder shadows what it imports.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line on standard error, or the exit code if there is none."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
