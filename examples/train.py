"""A small DDP job with Foreshock in it, on CPUs.

    torchrun --nproc-per-node 2 examples/train.py --lr 0.3

A learning rate of 0.03 trains well. With 0.3, the warm-up goes too far and the gradients explode.
"""

import argparse
import time
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.03)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--pace", type=float, default=0.0, help="seconds to wait after each step, to watch it live")
options = parser.parse_args()

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)  # the same weights on every rank
layers = OrderedDict(
    embed=nn.Linear(32, 64), act1=nn.ReLU(), hidden=nn.Linear(64, 64), act2=nn.ReLU(), head=nn.Linear(64, 1)
)
model = DistributedDataParallel(nn.Sequential(layers))
optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200))
watch = foreshock.attach(model, optimizer)  # clip=1.0 would clip

torch.manual_seed(1 + dist.get_rank())  # different data on every rank
for step in range(options.steps):
    x = torch.randn(64, 32)
    loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
    watch.observe(loss=loss, step=step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    warm_up.step()
    time.sleep(options.pace)
watch.detach()
dist.destroy_process_group()
