"""Mixed precision with gradient accumulation, on GPUs or CPUs.

    torchrun --nproc-per-node 2 examples/mixed_precision.py

`observe` is called once per optimizer step with the mean loss of its micro-batches. Norms are reported without the
GradScaler's scale, and clipping needs neither `scaler.unscale_` nor `clip_grad_norm_`.
"""

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
parser.add_argument("--accumulate", type=int, default=4, help="micro-batches per optimizer step")
options = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
torch.set_num_threads(1)
torch.manual_seed(0)  # the same weights on every rank
network = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)).to(device)
model = DistributedDataParallel(network, device_ids=[device.index] if cuda else None)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
# float16 needs a loss scale; bfloat16, which CPUs have, does not.
dtype = torch.float16 if cuda else torch.bfloat16
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
watch = foreshock.attach(model, optimizer, clip=1.0)

torch.manual_seed(1 + dist.get_rank())  # different data on every rank
for step in range(options.steps):
    losses = []
    for micro_batch in range(options.accumulate):
        x = torch.randn(32, 32, device=device)
        last = micro_batch == options.accumulate - 1
        with nullcontext() if last else model.no_sync():
            with torch.autocast(device.type, dtype=dtype):
                loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
            scaler.scale(loss / options.accumulate).backward()
        losses.append(loss.detach())
    watch.observe(loss=torch.stack(losses).mean(), step=step)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
watch.detach()
dist.destroy_process_group()
