"""Records cases: ranks in processes of their own, two cases at a time, one tape for all."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.faults.cases import Case
from benchmarks.faults.outcome import disagreement
from benchmarks.faults.tape import Tape, TapeServer
from benchmarks.faults.traces import from_messages, path_of, save

LANES = 2
"""Cases at a time."""
_STALL_SECONDS = 45.0
"""After so long a job that stands still has done so."""
_QUIET_SECONDS = 3.0
"""A job whose ranks have stopped telling of steps has stalled, or is over."""
_LONGEST_SECONDS = 300.0
_DELIVERY_SECONDS = 60.0
"""A busy machine may start a recorder only after the job has ended."""


def worker(pipe: Connection) -> None:
    """One rank's process: takes cases until told to stop."""
    import torch

    from benchmarks.faults.job import train

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        case, rank, store, collector = task
        try:
            train(case, rank, store, collector)
            pipe.send("")
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


class Lane:
    """Processes for the ranks of one case at a time; those that a case has killed are replaced."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, case: Case, collector: str, folder: Path) -> list[str]:
        """What each rank says at its end; "gone" where it can say nothing."""
        while len(self._ranks) < case.ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for rank, (_, pipe) in enumerate(self._ranks[: case.ranks]):
            pipe.send((case, rank, str(folder / f"{case.name}.store"), collector))
        deadline = time.monotonic() + (_STALL_SECONDS if case.fault == "stalled_rank" else _LONGEST_SECONDS)
        said = [self._hear(pipe, deadline) for _, pipe in self._ranks[: case.ranks]]
        if any(said):
            self.close()
        return said

    def _hear(self, pipe: Connection, deadline: float) -> str:
        try:
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                return str(pipe.recv())
        except (EOFError, ConnectionError):
            pass
        return "gone"

    def close(self) -> None:
        """End all of its processes."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()


def record(chosen: Sequence[Case]) -> list[str]:
    """Record cases, and write their traces. Returns what is wrong with them."""
    wrong: list[str] = []
    done = 0
    with TapeServer() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FORESHOCK_RING_DIR"] = str(folder / "rings")
        lanes = [Lane() for _ in range(LANES)]
        queue = list(reversed(chosen))

        def work(lane: Lane) -> None:
            nonlocal done
            while queue:
                case = queue.pop()
                begun = time.monotonic()
                said = lane.run(case, server.address, folder)
                _wait_for_exits(server.tape, case.name, said.count("") * (1 + len(case.relaunches)))
                if any(said):
                    time.sleep(_QUIET_SECONDS)
                messages = server.tape.messages.pop(case.name, [])
                try:
                    trace = from_messages(case, messages)
                    save(trace, path_of(case))
                    fault: str | None = disagreement(trace)
                except ValueError as error:
                    fault = str(error)
                if fault:
                    fault = f"{fault} {[text for text in said if text] or ''}"
                    wrong.append(f"{case.part} {case.name}: {fault}")
                done += 1
                took = time.monotonic() - begun
                note = f"  {fault}" if fault else ""
                sys.stderr.write(f"[{done}/{len(chosen)}] {case.part} {case.name} {took:.1f} s{note}\n")
            lane.close()

        with ThreadPoolExecutor(LANES) as pool:
            list(pool.map(work, lanes))
    return wrong


def _wait_for_exits(tape: Tape, run: str, count: int) -> None:
    """Wait until so many ends of ranks have arrived, since they ended by themselves, and all records before."""
    deadline = time.monotonic() + _DELIVERY_SECONDS
    while tape.exits[run] < count and time.monotonic() < deadline:
        time.sleep(0.05)
    del tape.exits[run]
