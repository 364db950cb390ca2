"""A small DDP job, as a user would write it. What happens to it comes as JSON in TRAIN."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock._output import recorder_process
from foreshock._watch import ActiveWatch

options = {
    "steps": 60, "pace": 0.0, "pace_from": 0, "explode_at": None, "nan_at": None, "nan_rank": None, "start": 0,
    "attach": {}, "attach_ranks": None, "zero_loss": False, "weights": "", "optimizer": "SGD",
    # What a rank does after a step, and which ranks do it.
    "kill_at": None, "raise_at": None, "error": "the script gives up", "exit_at": None, "exit_code": 1, "hang_at": None,
    "who": [0, 1, 2, 3],
    # What the script does about a loss or a gradient that is not finite.
    "guard": "",
    # File with the optimizer of the attempt before, and for the next one.
    "checkpoint": "",
    # How long attach waits for the collector's history of norms, in seconds; None: as long as it does by itself.
    "history_seconds": None,
    # Steps of a second model, trained and watched in turn with the first, as in a GAN, for each of its steps.
    "critic": 0,
} | json.loads(os.environ.get("TRAIN", "{}"))  # fmt: skip
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
optimizer = getattr(torch.optim, options["optimizer"])(model.parameters(), lr=0.01)
if options["checkpoint"] and Path(options["checkpoint"]).exists():
    optimizer.load_state_dict(torch.load(options["checkpoint"]))
if options["history_seconds"] is not None:
    recorder_process.HISTORY_SECONDS = options["history_seconds"]
watch = None
if options["attach_ranks"] is None or rank in options["attach_ranks"]:
    watch = foreshock.attach(model, optimizer, **options["attach"])
if options["critic"]:
    critic = DistributedDataParallel(nn.Linear(8, 1))
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)
    critic_watch = foreshock.attach(critic, critic_optimizer)
torch.manual_seed(1 + rank)
torch.autograd.set_detect_anomaly(options["guard"] == "anomaly", check_nan=True)
for i in range(options["steps"]):
    step = options["start"] + i
    x = torch.randn(16, 8)
    y = x.sum(1, keepdim=True)
    if i == options["explode_at"]:
        # Too high for this model: each step overshoots by more than the last, some fifty times, and then it is NaN.
        optimizer.param_groups[0]["lr"] = 0.5
    if i == options["nan_at"] and rank == options["nan_rank"]:
        x[0, 0] = float("nan")
    optimizer.zero_grad()
    out = model(x)
    # The loss of GRPO: exactly zero, its gradient is not.
    loss = (out - out.detach()).mean() if options["zero_loss"] else ((out - y) ** 2).mean()
    if watch is not None:
        watch.observe(loss=loss.detach(), step=step)
    if options["guard"] in ("exit", "raise", "skip"):
        everywhere = loss.detach().clone()
        dist.all_reduce(everywhere)
        if not math.isfinite(everywhere):
            if options["guard"] == "exit":
                sys.exit(1)
            if options["guard"] == "raise":
                raise FloatingPointError("Loss became infinite or NaN")
            continue
    loss.backward()
    if options["guard"] == "error_if_nonfinite":
        nn.utils.clip_grad_norm_(model.parameters(), 1e9, error_if_nonfinite=True)
    optimizer.step()
    for turn in range(options["critic"]):
        critic_optimizer.zero_grad()
        critic(x.nan_to_num()).square().mean().backward()
        critic_optimizer.step()
        critic_watch.observe(step=step * options["critic"] + turn)
    if rank == 0 and i % 1000 == 0:
        sys.stdout.write(f"step {i}\n")
        sys.stdout.flush()
    if rank in options["who"]:
        if i == options["kill_at"]:
            # How a process ends is known only to a recorder that was there before.
            assert isinstance(watch, ActiveWatch)
            while not watch._record.ring.recorder_seen:
                time.sleep(0.01)
            os.kill(os.getpid(), 9)
        if i == options["raise_at"]:
            raise RuntimeError(options["error"])
        if i == options["exit_at"]:
            sys.exit(options["exit_code"])
        if i == options["hang_at"]:
            time.sleep(86400)
    if options["pace"] and i >= options["pace_from"]:
        time.sleep(options["pace"])
if options["weights"]:
    torch.save(model.module.state_dict(), f"{options['weights']}-{rank}.pt")
if options["checkpoint"] and rank == 0:
    torch.save(optimizer.state_dict(), options["checkpoint"])
dist.destroy_process_group()
sys.stdout.write(f"rank {rank} done\n")
