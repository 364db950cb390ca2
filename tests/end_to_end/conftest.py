"""Real parts: a collector process, torchrun jobs, and what the collector says of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.collector_process import Collector
from tests.support.launched_jobs import TRAINING, Job, recorders
from tests.support.waiting import eventually


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    started = Collector(tmp_path)
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A collector with Prometheus, Alertmanager and a webhook around it."""
    from tests.support.alerted_collector import watching

    with watching(tmp_path_factory.mktemp("watch")) as all_of_it:
        yield all_of_it


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Start train.py under torchrun: job(run, collector address, ranks=2, environment={}, **options).

    torchrun: its options; under: a command to run it under.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        run: str,
        address: str,
        *,
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        torchrun: tuple[str, ...] = ("--standalone",),
        under: tuple[str, ...] = (),
        **options: Any,
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(ranks),
             str(TRAINING)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={
                **os.environ,
                "FORESHOCK_RING_DIR": str(tmp_path / "rings"),
                "FORESHOCK_COLLECTOR": address,
                "FORESHOCK_RUN": run,
                "FORESHOCK_STRICT": "1",
                "OMP_NUM_THREADS": "1",
                "TRAIN": json.dumps(options),
                **(environment or {}),
            },
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        # Ranks have sessions of their own: only torchrun can end them.
        process.terminate()
        assert process.stdout is not None
        process.stdout.close()
        process.wait(timeout=60)
    for pid in recorders(tmp_path):
        # Without an answer it would go on trying for half a minute.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    eventually(lambda: not recorders(tmp_path), "recorders that leave")
