"""A collector in a process of its own, on a core of its own, and what it costs there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from foreshock_collector.catalogue import COLLECTOR_RECORDS

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


def separate_cores() -> tuple[int, int]:
    """Return a core for the collector, and another for this process. The same one twice if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def cpu_seconds_of(process: int) -> float:
    """Return the processor time that a process has used so far, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass(frozen=True, kw_only=True)
class Scrape:
    """One answer of /metrics."""

    seconds: float
    """From the request to the last byte."""
    size: int
    """Bytes on the wire, compressed by gzip."""


class PinnedCollector:
    """Measures a collector's process."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, address: str, url: str) -> None:
        self._process = process
        self._folder = folder
        self.address = address
        """host:port of its gRPC service."""
        self.url = url

    def running(self) -> bool:
        """Return whether its process has not ended."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used so far, in seconds."""
        return cpu_seconds_of(self._process.pid)

    def memory_mib(self) -> float:
        """Return its largest resident memory so far, in MiB."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    def file_bytes(self) -> int:
        """Return the size of its database with the files beside it, in bytes."""
        return sum(path.stat().st_size for path in self._folder.glob("foreshock.db*"))

    def metrics(self) -> str:
        """Return the text of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            return str(response.read().decode())

    def scrape(self) -> Scrape:
        """Ask for /metrics as Prometheus does."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={"Accept-Encoding": "gzip"})
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as response:
            size = len(response.read())
        return Scrape(seconds=time.perf_counter() - start, size=size)

    def records_received(self) -> int:
        """Return how many step records it has received, as its own series count them."""
        found = re.search(rf"^{COLLECTOR_RECORDS.name} (\S+)$", self.metrics(), re.MULTILINE)
        assert found is not None
        return round(float(found[1]))


@contextmanager
def pinned_collector(folder: Path, core: int, *arguments: str) -> Iterator[PinnedCollector]:
    """Run a collector on a core until the block ends. arguments: more flags of `foreshock collector`."""
    ready, log = folder / "ready.json", folder / "collector.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *("taskset", "--cpu-list", str(core), sys.executable, "-m", "foreshock_collector"),
                *("--grpc-port=0", "--http-port=0", f"--database={folder / 'foreshock.db'}", f"--ready-file={ready}"),
                *arguments,
            ],
            stdout=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the collector did not start:\n{log.read_text()}")
            time.sleep(0.05)
        places = json.loads(ready.read_text())
        yield PinnedCollector(process, folder, places["grpc"], places["http"])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
