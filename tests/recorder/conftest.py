"""Real recorders between ranks without torch and a fake collector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_collector import FakeCollector
from tests.support.rank_process import RankProcess, Start

LINGER = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rings" / "crimson-otter" / "first"


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    fake = FakeCollector().start()
    yield fake
    fake.stop()


@pytest.fixture
def rank(folder: Path) -> Iterator[Callable[..., RankProcess]]:
    ranks: list[RankProcess] = []

    def start(**options: Any) -> RankProcess:
        ranks.append(RankProcess(folder, **options))
        return ranks[-1]

    yield start
    for started in ranks:
        started.end()


@pytest.fixture
def recorder(folder: Path, collector: FakeCollector) -> Iterator[Start]:
    """Starts a recorder; none may complain on its standard error, and all are killed afterwards."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str, linger: float = LINGER) -> subprocess.Popen[str]:
        arguments = arguments or ("--folder", str(folder))
        if "--collector" not in arguments:
            arguments += ("--collector", collector.address)
        command = [
            sys.executable, "-W", "error", "-m", "foreshock_recorder", *arguments, "--linger", str(linger),
        ]  # fmt: skip
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        assert process.communicate()[1] == ""
