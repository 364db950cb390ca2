"""Starts jobs of a few gloo ranks, with ring folders of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def parity(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run cases of parity.py on some ranks; what it found."""

    def run(cases: list[dict[str, Any]], ranks: int = 2) -> list[dict[str, Any]]:
        environment = {
            **os.environ,
            "FORESHOCK_RING_DIR": str(tmp_path / "rings"),
            # Nothing listens there: training must not mind.
            "FORESHOCK_COLLECTOR": "127.0.0.1:9",
            "FORESHOCK_STRICT": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
             str(HERE / "parity.py"), json.dumps(cases)],
            capture_output=True, text=True, timeout=150, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        results: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
        return results

    return run
