"""How much later a job takes its first step under `foreshock run`: two gloo ranks under torchrun, with it and without.

    python -m benchmarks.start_up --rounds 15

Until its second step, a watched job has imported Foreshock, attached, and started its recorder. Jobs with and without
take turns, and medians are compared, because other processes disturb each. They disturb CPU time less: that of rank 0,
and of `foreshock run` before that. No collector listens.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.commands import FORESHOCK
from tests.support.launched_jobs import recorders

SCRIPT = """
import sys
import time

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.ones(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
if dist.get_rank() == 0:
    with open(sys.argv[1], "w") as file:
        print(time.time(), time.process_time(), file=file)
dist.destroy_process_group()
"""
RUN = [*FORESHOCK, "run", "--"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def second_step(folder: Path, *, watched: bool) -> tuple[float, float]:
    """Start a job; the seconds until rank 0 has made its second step, and its CPU time until then."""
    script, times = folder / "train.py", folder / "times"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "FORESHOCK_RING_DIR": str(folder / "rings"),
        "FORESHOCK_COLLECTOR": "127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    began = time.time()
    command = [*(RUN if watched else ()), *TORCHRUN, str(script), str(times)]
    # Some processes of gloo are aborted at their end (torch 2.13): what counts is that there are times.
    subprocess.run(command, env=environment, check=False, capture_output=True)
    stepped, cpu = map(float, times.read_text().split())
    times.unlink()
    # It would go on trying for half a minute, and disturb the next job.
    for pid in recorders(folder):
        os.kill(pid, signal.SIGKILL)
    return stepped - began, cpu


def run_cpu() -> float:
    """CPU time of a `foreshock run` whose command does nothing."""
    before = os.times()
    subprocess.run([*RUN, "true"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="jobs with Foreshock, and as many without")
    options = parser.parse_args()
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="foreshock-start-up-") as folder:
        for _ in range(options.rounds):
            for watched in (False, True):
                found[watched].append(second_step(Path(folder), watched=watched))
    for place, name in enumerate(("until the second step", "CPU time of rank 0")):
        alone, ours = (statistics.median(times[place] for times in found[watched]) for watched in (False, True))
        sys.stdout.write(f"{name:24}{alone:6.2f} s alone {ours:6.2f} s watched {ours - alone:+6.2f} s\n")
    cpu = statistics.median(run_cpu() for _ in range(options.rounds))
    sys.stdout.write(f"{'CPU time of foreshock run':24}{cpu:+6.2f} s\n")


if __name__ == "__main__":
    main()
