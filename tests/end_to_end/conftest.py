"""Real parts: a collector process, torchrun jobs, and what the collector says of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DEADLINE = 90.0


def eventually(ask: Callable[[], Any], wanted: str) -> Any:
    """Ask until the answer is true; what it was."""
    deadline = time.monotonic() + DEADLINE
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"never came: {wanted}"
        time.sleep(0.05)
    return answer


def recorders(folder: Path) -> list[int]:
    """Process ids of the recorders that read rings in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "foreshock_recorder" in command and any(part.startswith(str(folder)) for part in command):
            found.append(int(process.name))
    return found


class Collector:
    """`foreshock collector` in a process, with a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = ("0", "0")
        self.start()

    def start(self) -> None:
        ready = self._folder / "ready.json"
        ready.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foreshock_collector", "--grpc-port", self._ports[0], "--http-port", self._ports[1],
             "--database", str(self._folder / "foreshock.db"), "--ack-seconds", "0.3", "--ready-file", str(ready)],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(ready.exists, "a collector that listens")
        places = json.loads(ready.read_text())
        self._address: str = places["grpc"]
        self.url: str = places["http"]
        self._ports = (self._address.rpartition(":")[2], self.url.rpartition(":")[2])

    @property
    def address(self) -> str:
        return self._address

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)

    def run(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.get(f"/api/v1/runs/{name}")
        return answer

    def names(self) -> list[str]:
        return [run["run"] for run in self.get("/api/v1/runs")["runs"]]

    def kill_and_restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    started = Collector(tmp_path)
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A collector with Prometheus, Alertmanager and a webhook around it."""
    from tests.end_to_end.watch import watching

    with watching(tmp_path_factory.mktemp("watch")) as all_of_it:
        yield all_of_it


Job = Callable[..., "subprocess.Popen[str]"]


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
             str(HERE / "train.py")],
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
