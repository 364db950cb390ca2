"""Real parts: a collector process, torchrun jobs, and what the collector says of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.alerted_collector import Watch, watching
from tests.support.collector_process import Collector
from tests.support.forked_jobs import forking
from tests.support.launched_jobs import TRAINING, Job, Launched, recorders
from tests.support.waiting import eventually


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    started = Collector(tmp_path)
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0


_watches: list[Watch] = []
"""At most one."""
_programs = ExitStack()
"""Those of it."""


@pytest.fixture
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    """A collector with Prometheus, Alertmanager and a webhook around it: one for all tests in a row that ask for it."""
    if not _watches:
        _watches.append(_programs.enter_context(watching(tmp_path_factory.mktemp("watch"))))
    return _watches[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        # A session's fixture would judge all rules every second until the last test of all.
        if not isinstance(nextitem, pytest.Function) or "watch" not in nextitem.fixturenames:
            _watches.clear()
            _programs.close()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Start train.py on some ranks: job(run, collector address, ranks=2, environment={}, **options).

    torchrun: launched by it, with these options, and not forked; under: a command to run torchrun under.
    """
    started: list[Launched] = []

    def start(
        run: str,
        address: str,
        *,
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        torchrun: tuple[str, ...] = (),
        under: tuple[str, ...] = (),
        **options: Any,
    ) -> Launched:
        settings = {
            "FORESHOCK_RING_DIR": str(tmp_path / "rings"),
            "FORESHOCK_COLLECTOR": address,
            "FORESHOCK_RUN": run,
            "FORESHOCK_STRICT": "1",
            "OMP_NUM_THREADS": "1",
            "TRAIN": json.dumps(options),
            **(environment or {}),
        }
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(ranks)]
            process = subprocess.Popen(
                [*under, *launcher, str(TRAINING)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, **settings},
            )  # fmt: skip
            started.append(process)
        else:
            text = tmp_path / f"{uuid.uuid4()}.txt"
            started.append(forking().start(TRAINING, ranks=ranks, output=(text, text), environment=settings))
        return started[-1]

    yield start
    for process in started:
        # Ranks have sessions of their own: only their launcher can end them.
        process.terminate()
        if isinstance(process, subprocess.Popen):
            assert process.stdout is not None
            process.stdout.close()
        process.wait(timeout=60)
    for pid in recorders(tmp_path):
        # Without an answer it would go on trying for half a minute.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    eventually(lambda: not recorders(tmp_path), "recorders that leave")
