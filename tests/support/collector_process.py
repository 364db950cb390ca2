"""`foreshock collector` in a process, and what it knows of a run that is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.waiting import eventually, free_port


class Collector:
    """`foreshock collector` in a process, with a database that outlives it."""

    def __init__(self, folder: Path, *, module: str = "foreshock_collector", log: str = "", **environment: str) -> None:
        """module: that runs as the collector's program does. log: file name. environment: further variables."""
        self._folder, self._module, self._environment = folder, module, {**os.environ, **environment}
        self._log = log
        # Its own when it starts again.
        self._ports = (str(free_port()), str(free_port()))
        self.start()

    def start(self) -> None:
        ready = self._folder / "ready.json"
        ready.unlink(missing_ok=True)
        log = (self._folder / self._log).open("ab") if self._log else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", self._module, "--grpc-port", self._ports[0], "--http-port", self._ports[1],
             "--database", str(self.database), "--ack-seconds", "0.3", "--ready-file", str(ready)],
            stdout=subprocess.DEVNULL, stderr=log, env=self._environment,
        )  # fmt: skip
        if log is not None:
            log.close()
        eventually(ready.exists, "a collector that listens")
        places = json.loads(ready.read_text())
        self._address: str = places["grpc"]
        self.url: str = places["http"]

    @property
    def database(self) -> Path:
        return self._folder / "foreshock.db"

    @property
    def address(self) -> str:
        return self._address

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text: str = response.read().decode()
        return text

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


def left(collector: Collector, run: str) -> dict[str, Any]:
    eventually(lambda: run in collector.names(), "the run")
    answer: dict[str, Any] = eventually(
        lambda: (seen := collector.run(run)) and all(r["state"] != "running" for r in seen["ranks"]) and seen,
        "ranks that have left",
    )
    return answer
