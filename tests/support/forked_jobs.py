"""Jobs whose ranks are forked from a process that has imported torch, for all that does not depend on torchrun."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT
from tests.support.waiting import WAIT_SECONDS


class ForkedJob:
    """Ranks of one job, as `subprocess.Popen` shows those of a torchrun: what one fails of ends the others."""

    def __init__(self, output: tuple[Path, Path], store: Any) -> None:
        self.pids: list[int] = []
        self._output = output
        self._store = store
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that are over, by process id."""
        self._changed = threading.Condition()

    def started(self, pids: list[int]) -> None:
        with self._changed:
            self.pids = pids
            self._changed.notify_all()

    def ended(self, pid: int, code: int) -> None:
        with self._changed:
            self.codes[pid] = code
            self._changed.notify_all()
        if code:
            self.send_signal(signal.SIGTERM)

    @property
    def pid(self) -> int:
        """Of rank 0."""
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.pids), WAIT_SECONDS)
        return self.pids[0]

    def poll(self) -> int | None:
        with self._changed:
            return self._returncode()

    def wait(self, timeout: float | None = None) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self._returncode() is not None, timeout):
                raise subprocess.TimeoutExpired(str(self._output[0]), timeout or 0.0)
            code = self._returncode()
        assert code is not None
        self._store = None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What all ranks have written, once they are over."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        """To each rank that is not over, and to all that it has forked."""
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.pids), WAIT_SECONDS)
            left = [pid for pid in self.pids if pid not in self.codes]
        for pid in left:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _returncode(self) -> int | None:
        if not self.pids or len(self.codes) < len(self.pids):
            return None
        return int(any(self.codes.values()))


class Forking:
    """The process that forks, and a thread that hears which ranks have started and ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._starting: queue.SimpleQueue[ForkedJob] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def start(
        self, script: Path, *arguments: str, ranks: int, output: tuple[Path, Path], environment: dict[str, str]
    ) -> ForkedJob:
        """Fork a rank for each; what they write goes to the end of two files, which may be one."""
        import torch.distributed as dist

        # On a port that is free, and as torchrun does, outside of the ranks: none has to outlive the others.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        launch = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": str(uuid.uuid4()),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        job = ForkedJob(output, store)
        self._starting.put(job)
        orders = [
            {
                "script": str(script),
                "arguments": arguments,
                "environment": {**os.environ, **launch, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "output": [str(path) for path in output],
            }
            for rank in range(ranks)
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return job

    def stop(self) -> None:
        """No rank outlives it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=WAIT_SECONDS)
        self._reader.join()
        self._process.stdout.close()

    def _read(self) -> None:
        jobs: dict[int, ForkedJob] = {}
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if pids := answer.get("started"):
                job = self._starting.get()
                job.started(pids)
                jobs |= dict.fromkeys(pids, job)
            else:
                jobs.pop(answer["ended"]).ended(answer["ended"], answer["code"])


@cache
def forking() -> Forking:
    """One for all tests of this process, made when the first of them asks; tests/conftest.py stops it."""
    return Forking()
