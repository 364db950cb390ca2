"""A rank without torch, in a process: makes a ring, then follows orders, one line of JSON each."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_name
from tests.support.repository import ROOT
from tests.support.rings import begin, make_ring, step

Start = Callable[..., "subprocess.Popen[str]"]
"""Starts a recorder."""


class RankProcess:
    """A rank in a process of its own, which does what it is told."""

    def __init__(self, folder: Path, *, under: tuple[str, ...] = (), **options: Any) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "tests.support.rank_process", str(folder), json.dumps(options)],
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


def orders() -> Iterator[tuple[str, dict[str, Any]]]:
    for line in sys.stdin:
        what, arguments = json.loads(line)
        yield what, arguments


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    ring = make_ring(folder, **options)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for what, arguments in orders():
        if what == "steps":
            for _ in range(arguments["count"]):
                step(ring, ring.begun + 1)
        elif what == "bad":
            step(ring, ring.begun + 1, global_norm=math.nan, global_nan_parameters=1.0)
        elif what == "begin":
            begin(ring, ring.begun + 1)
        elif what == "fail":
            ring.write_error(arguments["note"])
            ring.count_dropped("probe_error")
        elif what == "idle":
            ring.write_idle(arguments["idle"])
        elif what == "leave":
            ring.write_exit(ExitReason[arguments["reason"]], arguments.get("detail", ""))
        elif what == "exit":
            os._exit(arguments["code"])
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
