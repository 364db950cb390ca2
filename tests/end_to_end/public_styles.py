"""A job that trains in public styles, one after another. Of Foreshock, it knows only what each run is called."""

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.agent.scenarios.public_scripts import PUBLIC_SCRIPTS

folder, *names = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
for name in names:
    os.environ["FORESHOCK_RUN"] = name
    trained = PUBLIC_SCRIPTS[name]()
    left = {
        "weights": [p.detach() for model in trained.models for p in model.parameters()],
        "losses": trained.losses,
        "norms": trained.norms,
    }
    torch.save(left, Path(folder, f"{name}-{dist.get_rank()}.pt"))
dist.barrier()
# What registered for the end runs, but not all of the interpreter's: a thread of gloo that lets go of a collective
# meanwhile aborts the process, in trainings without Foreshock too (torch 2.13).
atexit._run_exitfuncs()
sys.stderr.flush()
os._exit(0)
