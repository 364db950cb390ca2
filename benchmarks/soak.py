"""A long training of two ranks: memory that stays flat, no thread added to a rank, no file and no process left behind.

Not part of the tests, since it takes minutes. Prints what it saw, and ends with 1 where something grew or stayed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from benchmarks.step import collecting
from tests.support.launched_jobs import recorders

RANKS = 2
SAMPLES = 10
RANK_GROWTH_KIB = 2048
"""Between the first tenth and the end: the allocator's own noise is below it."""
RECORDER_GROWTH_KIB = 1024


def status(pid: int, name: str) -> int:
    """Of a process: VmRSS is its memory that is in RAM, in KiB; Threads, how many it has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def train(steps: int, result: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(watch: foreshock.Watch) -> None:
        x = torch.randn(16, 32)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        watch.observe(loss=loss)
        loss.backward()
        optimizer.step()

    for _ in range(20):
        # Torch starts threads of its own with the first backward passes.
        step(foreshock.Watch())
    threads = status(os.getpid(), "Threads")
    memory, threads_then = [], []
    with foreshock.attach(model, optimizer, clip=1.0, run="soak") as watch:
        for number in range(1, steps + 1):
            step(watch)
            if number % (steps // SAMPLES) == 0:
                memory.append(status(os.getpid(), "VmRSS"))
                threads_then.append(status(os.getpid(), "Threads"))
                if dist.get_rank() == 0:
                    sys.stderr.write(f"  step {number}: {memory[-1]} KiB\n")
    seen = {"memory_kib": memory, "threads": [threads, *threads_then]}
    Path(f"{result}.{dist.get_rank()}").write_text(json.dumps(seen))
    dist.destroy_process_group()


def watch_over(steps: int) -> list[str]:
    """Run the job; what was wrong."""
    with tempfile.TemporaryDirectory() as name, collecting(Path(name)) as (grpc, http):
        folder, rings = Path(name), Path(name) / "rings"
        result, recorder_kib = folder / "result", list[int]()
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "FORESHOCK_COLLECTOR": grpc, "FORESHOCK_RING_DIR": str(rings),
            "FORESHOCK_STRICT": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
        }  # fmt: skip
        job = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__,
             "--steps", str(steps), "--result", str(result)],
            env=environment,
        )  # fmt: skip
        while job.poll() is None:
            time.sleep(1.0)
            for pid in recorders(rings):
                try:
                    recorder_kib.append(status(pid, "VmRSS"))
                except (OSError, StopIteration):
                    continue
        if job.returncode:
            return [f"the job ended with {job.returncode}"]
        ranks = [json.loads(Path(f"{result}.{rank}").read_text()) for rank in range(RANKS)]
        return judge(steps, ranks, recorder_kib, stored(http, steps), rings)


def judge(steps: int, ranks: list[dict[str, Any]], recorder_kib: list[int], kept: int, rings: Path) -> list[str]:
    """Say what was seen; what was wrong with it."""
    wrong = []
    for rank, seen in enumerate(ranks):
        memory, (before, *after) = seen["memory_kib"], seen["threads"]
        print(f"rank {rank}: {memory[0]} to {memory[-1]} KiB; threads {before} before attach, {max(after)} after")
        if memory[-1] - memory[0] > RANK_GROWTH_KIB:
            wrong.append(f"rank {rank} grew by {memory[-1] - memory[0]} KiB")
        if max(after) > before:
            wrong.append(f"rank {rank} has {max(after) - before} thread(s) more")
    # Its first tenth starts it up.
    settled = recorder_kib[len(recorder_kib) // SAMPLES :]
    print(f"recorder: {settled[0]} to {settled[-1]} KiB; {kept} of {steps} steps stored")
    if settled[-1] - settled[0] > RECORDER_GROWTH_KIB:
        wrong.append(f"the recorder grew by {settled[-1] - settled[0]} KiB")
    if kept != steps:
        wrong.append(f"{kept} steps of {steps} were stored")
    deadline = time.monotonic() + 30
    while (left := recorders(rings)) and time.monotonic() < deadline:
        time.sleep(0.1)
    files = [str(path.relative_to(rings)) for path in rings.rglob("*") if path.suffix == ".ring"]
    print(f"left behind: {len(left)} processes, {len(files)} rings")
    if left or files:
        wrong.append(f"left behind: processes {left}, files {files}")
    return wrong


def stored(url: str, steps: int) -> int:
    """Steps that the collector has, once it has all or time is up."""
    deadline = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"{url}/api/v1/runs/soak", timeout=10) as response:
            count = int(json.load(response)["counters"]["steps"])
        if count >= steps or time.monotonic() > deadline:
            return count
        time.sleep(0.2)


def main() -> None:
    """Train long, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        train(options.steps, options.result)
        return
    wrong = watch_over(options.steps)
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
