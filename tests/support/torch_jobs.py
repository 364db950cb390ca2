"""Runs jobs of a few gloo ranks: scripts of tests/agent/scenarios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT

SCRIPTS = ROOT / "tests/agent/scenarios"
ARITHMETIC = ["host", "device"]
"""Floats, as on a CPU; small kernels without a read-back, as on a GPU, tried on the CPU's tensors."""
Job = Callable[..., "subprocess.CompletedProcess[str]"]


def run_job(
    rings: Path, script: str, *arguments: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of `SCRIPTS` under torchrun, to its end. A job that hangs fails by its time limit."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(SCRIPTS / script), *arguments],
        capture_output=True, text=True, timeout=150, check=False,
        env={
            **os.environ,
            "FORESHOCK_RING_DIR": str(rings),
            # Nothing listens there: training must not mind.
            "FORESHOCK_COLLECTOR": "127.0.0.1:9",
            "FORESHOCK_STRICT": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """What a scenario found on each rank, and the lines that it said there."""

    results: list[Any]
    said: list[list[str]]
    stderr: str
    """Of the whole job, launcher and C++ included."""


def run_scenarios(
    folder: Path, script: str, names: Iterable[str], *, ranks: int = 2, **environment: str
) -> dict[str, Scenario]:
    """Run scenarios of a script (see training.py) one after another in one job."""
    names = list(names)
    done = run_job(folder / "rings", script, str(folder), *names, ranks=ranks, **environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        name: Scenario(
            results=[f[name]["result"] for f in found], said=[f[name]["said"] for f in found], stderr=done.stderr
        )
        for name in names
    }
