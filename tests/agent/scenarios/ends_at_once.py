"""A training whose last backward pass is its last line. Run by torchrun; see test_faults.py."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(64, 64))
foreshock.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
x = torch.randn(4, 64)
for _ in range(3):
    model(x).sum().backward()
# Threads that want the interpreter get it late: what may go wrong at the end goes wrong sooner.
sys.setswitchinterval(100)
model(x).sum().backward()
