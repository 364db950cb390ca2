"""DDP workers that Ray Train starts, with Foreshock in them.

    pip install 'ray[train]' && python examples/ray_train.py --workers 2

The workers' processes are Ray's, so the address of the collector and the run's name are handed to them: every start of
the script with the same `--name` is an attempt of the same run.
"""

import argparse
import os

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

import foreshock


def train_worker(settings: dict) -> None:
    """Train on one worker."""
    torch.manual_seed(0)  # the same weights on every rank
    model = prepare_model(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"])
    watch = foreshock.attach(model, optimizer)
    torch.manual_seed(1 + train.get_context().get_world_rank())  # different data on every rank
    for step in range(settings["steps"]):
        x = torch.randn(64, 32)
        loss = ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean()
        watch.observe(loss=loss, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train.report({"loss": loss.item()})
    watch.detach()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="ray-example")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    options = parser.parse_args()
    passed = {name: value for name, value in os.environ.items() if name.startswith("FORESHOCK_")}
    ray.init(runtime_env={"env_vars": passed | {"FORESHOCK_RUN": options.name}})
    TorchTrainer(
        train_worker,
        train_loop_config={"lr": options.lr, "steps": options.steps},
        scaling_config=train.ScalingConfig(num_workers=options.workers),
        run_config=train.RunConfig(name=options.name),
    ).fit()
