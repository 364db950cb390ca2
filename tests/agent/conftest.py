"""Arithmetic on host and device, and jobs of a few gloo ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreshock._arithmetic import arithmetic as chosen
from tests.support.torch_jobs import ARITHMETIC, Job, run_job


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that asks for it runs with either."""
    if request.param == "device":
        monkeypatch.setattr(chosen, "HOSTS", frozenset())
    return str(request.param)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run a script of scenarios/: job(script, *arguments, ranks=2, torchrun=False, FORESHOCK_...="...")."""

    def run(
        script: str, *arguments: str, ranks: int = 2, torchrun: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run_job(tmp_path / "rings", script, *arguments, ranks=ranks, torchrun=torchrun, **environment)

    return run


@pytest.fixture
def parity(job: Job) -> Callable[..., list[dict[str, Any]]]:
    """Run cases of parity.py on some ranks; what it found."""

    def run(cases: list[dict[str, Any]], ranks: int = 2) -> list[dict[str, Any]]:
        done = job("parity.py", json.dumps(cases), ranks=ranks)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        results: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
        return results

    return run
