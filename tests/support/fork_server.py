"""A process that has imported torch once, and forks ranks from there: each would take two seconds to import it anew.

A forked rank ends as a launched one does: its script is the last thing that its interpreter runs, so exceptions,
`sys.exit` and `atexit` take their usual way. What depends on how an interpreter starts needs torchrun.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOADED = ("torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo")
"""The last one is what the first optimizer of a process imports."""


class ForkServer:
    """Forks what its standard input orders, a list of ranks a line; answers which have started, and which ended."""

    def __init__(self) -> None:
        # Ranks get a standard output of their own.
        self._answers = os.fdopen(os.dup(1), "w")
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._running: set[int] = set()

    def serve(self) -> dict[str, Any] | None:
        """Until the input ends: None. In a forked rank: its order, at once."""
        rest = b""
        while True:
            readable, _, _ = select.select([0, self._woken], [], [])
            if self._woken in readable:
                os.read(self._woken, 4096)
                self._reap()
            if 0 in readable:
                if not (chunk := os.read(0, 2**20)):
                    self._kill()
                    return None
                *jobs, rest = (rest + chunk).split(b"\n")
                for job in jobs:
                    if (order := self._fork(json.loads(job))) is not None:
                        return order

    def _fork(self, orders: list[dict[str, Any]]) -> dict[str, Any] | None:
        started = []
        for order in orders:
            if not (pid := os.fork()):
                self._leave_to_the_rank()
                return order
            started.append(pid)
        self._running |= set(started)
        self._say({"started": started})
        return None

    def _leave_to_the_rank(self) -> None:
        """In the rank: nothing of the server is left."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._woken)
        os.close(self._wake)
        self._answers.close()

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._running.discard(pid)
                self._say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _kill(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def become(order: dict[str, Any]) -> str:
    """Make this process the rank of an order; its script's text."""
    os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        file = os.open(order["output"][descriptor - 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
        stream.reconfigure(line_buffering=False, write_through=True)  # type: ignore[union-attr]
    script = order["script"]
    sys.argv = [script, *order["arguments"]]
    sys.path[0] = str(Path(script).parent)
    # Not by runpy: it would take the script's names apart before the interpreter ends.
    module = ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    return Path(script).read_text("utf-8")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in what is forked"  # noqa: PTH208
    # Collecting garbage writes into pages that are shared.
    gc.freeze()
    if (mine := ForkServer().serve()) is not None:
        text = become(mine)
        exec(compile(text, mine["script"], "exec"), vars(sys.modules["__main__"]))
