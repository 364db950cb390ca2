"""A job that resumes from its checkpoint. Each start is an attempt of the same run.

    export FORESHOCK_RUN=resumed
    torchrun --nproc-per-node 2 examples/resume.py --checkpoint /tmp/resumed.pt --steps 100
    torchrun --nproc-per-node 2 examples/resume.py --checkpoint /tmp/resumed.pt --steps 200

The second start continues at step 100. The run's name makes it the next attempt; `observe(step=...)` makes its steps
continue on the page and in alerts.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, required=True)
parser.add_argument("--steps", type=int, default=100, help="the step to stop at")
parser.add_argument("--save-every", type=int, default=50)
options = parser.parse_args()

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)  # the same weights on every rank
model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
first_step = 0
if options.checkpoint.exists():
    checkpoint = torch.load(options.checkpoint, weights_only=True)
    model.module.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    first_step = checkpoint["step"]
watch = foreshock.attach(model, optimizer, clip=10.0)

for step in range(first_step, options.steps):
    torch.manual_seed(1 + step * dist.get_world_size() + dist.get_rank())  # different data on every rank and step
    x = torch.randn(64, 32)
    loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
    watch.observe(loss=loss, step=step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and (step + 1) % options.save_every == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        partial = options.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(options.checkpoint)  # a job that is killed here leaves the older checkpoint whole
watch.detach()
dist.destroy_process_group()
