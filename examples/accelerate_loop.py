"""A loop with Hugging Face's Accelerate and Foreshock, on CPUs.

    pip install '.[accelerate]'
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --lr 0.3

A learning rate of 0.03 trains well. With 0.3, the warm-up goes too far and the gradients explode. With `--clip 1.0`,
Foreshock clips.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import foreshock

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.03)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--clip", type=float, help="by which Foreshock clips")
options = parser.parse_args()

set_seed(0)  # the same weights on every rank
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
layers = nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1))
optimizer = torch.optim.SGD(layers.parameters(), lr=options.lr, momentum=0.9)
warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200))
inputs = torch.randn(64 * accelerator.num_processes * options.steps, 32)
model, optimizer, data = accelerator.prepare(layers, optimizer, DataLoader(inputs, batch_size=64))
watch = foreshock.attach(model, optimizer, clip=options.clip)

for step, x in enumerate(data):
    loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
    watch.observe(loss=loss, step=step)
    accelerator.backward(loss)
    optimizer.step()
    warm_up.step()
    optimizer.zero_grad()
watch.detach()
accelerator.end_training()
