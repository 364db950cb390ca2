"""Starts jobs of a few gloo ranks, and recorders between ranks without torch and a fake collector."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foreshock import _numbers
from foreshock_recorder.ring import ring_name
from tests.agent.fake_collector import WAIT_SECONDS, FakeCollector

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LINGER = 20.0
ARITHMETIC = ["host", "device"]
"""Floats, as on a CPU; small kernels without a read-back, as on a GPU, tried on the CPU's tensors."""


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that asks for it runs with either."""
    if request.param == "device":
        monkeypatch.setattr(_numbers, "HOSTS", frozenset())
    return str(request.param)


Job = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]


def run_job(
    rings: Path, script: str, *arguments: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder under torchrun, to its end. A job that hangs fails by its time limit."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(HERE / script), *arguments],
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


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run a script of this folder under torchrun: job(script, *arguments, ranks=2, FORESHOCK_...="...")."""

    def run(script: str, *arguments: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_job(tmp_path / "rings", script, *arguments, ranks=ranks, **environment)

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


# -- recorders -------------------------------------------------------------------------------------------------------


class RankProcess:
    """A rank in a process of its own, which does what it is told."""

    def __init__(self, folder: Path, *, under: tuple[str, ...] = (), **options: Any) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "tests.agent.rank", str(folder), json.dumps(options)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._heard()
        self.path = folder / ring_name("first", options.get("rank", 0))

    def do(self, what: str, **arguments: Any) -> None:
        """Give an order and wait until it is done."""
        self.tell(what, **arguments)
        self._heard()

    def tell(self, what: str, **arguments: Any) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, arguments]) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Leave nothing behind in the test's process either."""
        self.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def _heard(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "the rank has ended"


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


def until(what: Callable[[], bool]) -> None:
    """Shared memory wakes nobody: look until it holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
