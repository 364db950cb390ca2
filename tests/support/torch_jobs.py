"""Runs jobs of a few gloo ranks: scripts of tests/agent/scenarios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_jobs import forking
from tests.support.repository import ROOT
from tests.support.waiting import PATIENCE

SCRIPTS = ROOT / "tests/agent/scenarios"
ARITHMETIC = ["host", "device"]
"""Floats, as on a CPU; small kernels without a read-back, as on a GPU, tried on the CPU's tensors."""
_NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux on x86-64 only")
PATHS = [*ARITHMETIC, pytest.param("kernels", marks=_NO_TRITON)]
"""Ways through a step: either arithmetic, and that of Triton's kernels, in whose place `kernels_in_torch` computes."""
Job = Callable[..., "subprocess.CompletedProcess[str]"]


JOB_SECONDS = 150.0 * PATIENCE


def run_job(
    rings: Path, script: str, *arguments: str, ranks: int = 2, torchrun: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of `SCRIPTS` on some ranks, to its end: forked, or under torchrun. One that hangs fails."""
    environment = {
        "FORESHOCK_RING_DIR": str(rings),
        # Nothing listens there: training must not mind.
        "FORESHOCK_COLLECTOR": "127.0.0.1:9",
        # Each attach would start a recorder, at half a second of CPU, and nobody reads what it would send.
        "FORESHOCK_RECORDER_PYTHON": "true",
        "FORESHOCK_STRICT": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return subprocess.run(
            [*command, str(SCRIPTS / script), *arguments],
            capture_output=True, text=True, timeout=JOB_SECONDS, check=False, env={**os.environ, **environment},
        )  # fmt: skip
    output = Path(tempfile.mkdtemp(dir=rings.parent))
    files = (output / "stdout", output / "stderr")
    job = forking().start(SCRIPTS / script, *arguments, ranks=ranks, output=files, environment=environment)
    try:
        out, err = job.communicate(JOB_SECONDS)
    finally:
        job.kill()
    return subprocess.CompletedProcess([script, *arguments], job.wait(), out, err)


@dataclass(frozen=True)
class Scenario:
    """What a scenario found on each rank, and the lines that it said there."""

    results: list[Any]
    said: list[list[str]]
    stderr: str
    """Of the whole job, launcher and C++ included."""

    def lines_with(self, text: str) -> list[int]:
        """How many lines of each rank hold a text."""
        return [sum(text in line for line in lines) for lines in self.said]


def run_scenarios(
    folder: Path, script: str, names: Iterable[str], *, ranks: int = 2, torchrun: bool = False, **environment: str
) -> dict[str, Scenario]:
    """Run scenarios of a script (see training.py) one after another in one job."""
    names = list(names)
    done = run_job(folder / "rings", script, str(folder), *names, ranks=ranks, torchrun=torchrun, **environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        name: Scenario(
            results=[f[name]["result"] for f in found], said=[f[name]["said"] for f in found], stderr=done.stderr
        )
        for name in names
    }
