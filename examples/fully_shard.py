"""A model sharded by `fully_shard` (FSDP2), clipped by Foreshock, on GPUs or CPUs.

    torchrun --nproc-per-node 2 examples/fully_shard.py

The page shows the norms that `torch.nn.utils.get_total_norm` would compute.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import foreshock

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.set_num_threads(1)
mesh = init_device_mesh(device, (dist.get_world_size(),))
torch.manual_seed(0)  # the same weights on every rank
blocks = [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3)]
model = nn.Sequential(nn.Linear(32, 128), *blocks, nn.Linear(128, 1)).to(device)
for block in blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
watch = foreshock.attach(model, optimizer, clip=1.0)

torch.manual_seed(1 + dist.get_rank())  # different data on every rank
for step in range(options.steps):
    x = torch.randn(32, 32, device=device)
    loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
    watch.observe(loss=loss, step=step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
watch.detach()
dist.destroy_process_group()
