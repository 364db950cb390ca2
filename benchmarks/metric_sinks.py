"""Compares what a collector costs with what general stores of metrics cost that take the same numbers.

Each sink gets nine numbers of every simulated rank and step, once a second, as its own clients would send them: a
collector in blocks, VictoriaMetrics by its import of JSON lines with their times, Pushgateway the newest step only,
which is all that it can hold. Each has a core of its own, the sender another one. A collector also gets 16 layers of
each step, judges it and stores it for its verdicts; the others do nothing with it. Prints processor time for each
number that came in, as the sink itself counts them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.collector import measure
from benchmarks.load.pinned_collector import cpu_seconds_of, separate_cores
from benchmarks.load.simulated_ranks import Job

SERIES = 9
"""Numbers of a rank and step: global and local norm, loss, clip coefficient, learning rate, and the like."""
RANKS_PER_NODE = 8
_START_SECONDS = 30.0
_WARM_UP_SECONDS = 2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Holds what one sink took for the numbers that it was sent."""

    sink: str
    numbers: int
    """Sent after the warm-up."""
    taken: float
    """Share of all numbers sent that the sink has counted."""
    core_share: float
    microseconds: float
    """Processor time of the sink for each number."""


class Pushgateway:
    """Takes the newest value of each series, as text, for one rank at a time."""

    name = "Pushgateway"
    program = "prometheus-pushgateway"

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]

    def send(self, connection: http.client.HTTPConnection, second: int, ranks: range, steps: int) -> int:
        for rank in ranks:
            body = "".join(f"foreshock_{series} {second + rank / 7 + series}\n" for series in range(SERIES))
            connection.request("PUT", f"/metrics/job/foreshock/run/run{rank // 64}/rank/{rank}", body)
            _answered(connection)
        return len(ranks) * SERIES

    def counted(self, metrics: str) -> float:
        pushes = _sum(metrics, r'pushgateway_http_requests_total\{code="20\d",handler="push",method="put"\}')
        return pushes * SERIES


class VictoriaMetrics:
    """Takes each value with its time, as a line of JSON for each series."""

    name = "VictoriaMetrics import"
    program = "victoria-metrics"

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, f"-storageDataPath={folder}", f"-httpListenAddr=127.0.0.1:{port}", "-loggerLevel=ERROR"]

    def send(self, connection: http.client.HTTPConnection, second: int, ranks: range, steps: int) -> int:
        times = [int(1000 * (time.time() - 1 + step / steps)) for step in range(steps)]
        lines = []
        for rank in ranks:
            for series in range(SERIES):
                metric = {"__name__": f"foreshock_{series}", "run": f"run{rank // 64}", "rank": str(rank)}
                values = [second + rank / 7 + series + step / 3 for step in range(steps)]
                lines.append(json.dumps({"metric": metric, "values": values, "timestamps": times}))
        connection.request("POST", "/api/v1/import", "\n".join(lines))
        _answered(connection)
        return len(ranks) * SERIES * steps

    def counted(self, metrics: str) -> float:
        return _sum(metrics, r'vm_rows_inserted_total\{type="vmimport"\}')


def _answered(connection: http.client.HTTPConnection) -> None:
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status < 300, text


def _sum(metrics: str, series: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{series} (\S+)$", metrics, re.MULTILINE))


@contextmanager
def _running(command: list[str], core: int, port: int) -> Iterator[int]:
    """Run a program on a core until the block ends; its process id."""
    process = subprocess.Popen(["taskset", "--cpu-list", str(core), *command])
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start") from None
                time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def measure_sink(sink: Pushgateway | VictoriaMetrics, ranks: int, steps: int, seconds: int) -> Cost:
    """Send a sink a second's numbers of all ranks every second. steps: of each rank and second."""
    core, _ = separate_cores()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, _running(sink.command(Path(folder), port), core, port) as process:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        start, sent, numbers, cpu = time.monotonic(), 0, 0, 0.0
        for second in range(_WARM_UP_SECONDS + seconds):
            if second == _WARM_UP_SECONDS:
                cpu, sent = cpu_seconds_of(process), numbers
            for first in range(0, ranks, RANKS_PER_NODE):
                node = range(first, min(ranks, first + RANKS_PER_NODE))
                numbers += sink.send(connection, second, node, steps)
            time.sleep(max(0.0, start + second + 1 - time.monotonic()))
        cpu = cpu_seconds_of(process) - cpu
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            counted = sink.counted(answer.read().decode())
    return _cost(sink.name, numbers - sent, counted / numbers, cpu, seconds)


def measure_collector(ranks: int, steps: int, seconds: int) -> Cost:
    """Send a collector the same steps in blocks of a node's ranks."""
    job = Job(ranks=ranks, ranks_per_run=64, ranks_per_stream=RANKS_PER_NODE, rate=steps)
    found = measure(job, _WARM_UP_SECONDS + 1.0 + seconds)
    cpu = found.core_share * seconds
    return _cost("foreshock collector", ranks * steps * seconds * SERIES, found.stored / found.sent, cpu, seconds)


def _cost(sink: str, numbers: int, taken: float, cpu: float, seconds: int) -> Cost:
    return Cost(
        sink=sink,
        numbers=numbers,
        taken=round(taken, 4),
        core_share=round(cpu / seconds, 3),
        microseconds=round(1e6 * cpu / numbers, 2),
    )


def main() -> int:
    """Measure each sink that is installed, one after another. Return 1 if one has lost numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metric_sinks", description=__doc__)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--rate", type=int, default=10, help="steps a second of each rank")
    parser.add_argument("--seconds", type=int, default=15, help="for each sink, after its warm-up")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each sink")
    options = parser.parse_args()
    shape = (options.ranks, options.rate, options.seconds)
    found = [measure_collector(*shape)]
    for sink in (VictoriaMetrics(), Pushgateway()):
        if shutil.which(sink.program) is None:
            sys.stderr.write(f"{sink.program} is not installed\n")
            continue
        found.append(measure_sink(sink, *shape))
    if options.json:
        sys.stdout.write("".join(json.dumps(asdict(cost)) + "\n" for cost in found))
    else:
        sys.stdout.write("| sink | numbers/s | taken | core | µs a number |\n| --- | --- | --- | --- | --- |\n")
        for cost in found:
            sys.stdout.write(
                f"| {cost.sink} | {cost.numbers / options.seconds:,.0f} | {cost.taken:.1%} | {cost.core_share:.0%} "
                f"| {cost.microseconds:g} |\n"
            )
    return int(any(cost.taken < 1 for cost in found))


if __name__ == "__main__":
    sys.exit(main())
