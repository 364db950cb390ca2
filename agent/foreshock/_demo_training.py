"""The training job of `foreshock demo`: a plain recurrent character model on real text, as a DDP script of two ranks.

Run by torchrun with options for each act. Nothing in it knows how an act will end.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

CONTEXT = 6
"""Characters that the model sees."""
BATCH = 64
"""Per rank."""
EMBEDDING, HIDDEN = 32, 128
WARM_UP_STEPS = 100
_SOURCES = ("argparse", "ast", "dataclasses", "inspect", "subprocess", "typing")


class CharacterModel(nn.Module):
    """Tells the next character at each position: [batch, time, characters] of one-hot rows in, logits out."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        # An nn.Embedding that takes one-hot rows: data that can hold a NaN.
        self.embedding = nn.Linear(characters, EMBEDDING, bias=False)
        nn.init.normal_(self.embedding.weight)
        self.recurrent = nn.RNN(EMBEDDING, HIDDEN, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        hidden, _ = self.recurrent(self.embedding(x))
        return self.head(hidden)  # type: ignore[no-any-return]


def corpus() -> torch.Tensor:
    """The standard library's own sources, as character numbers."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES)
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text])


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True, help="reached by a linear warm-up")
    parser.add_argument("--clip", type=float, help="largest gradient norm")
    parser.add_argument("--nan-at", type=int, default=-1, help="step at which rank 1 gets a NaN in its batch")
    parser.add_argument("--seconds-per-step", type=float, default=0.0, help="seconds per step, to slow the run down")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    text = corpus()
    characters = int(text.max()) + 1
    torch.manual_seed(options.seed)
    model = DistributedDataParallel(CharacterModel(characters))
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.97, fused=True)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
    batches = torch.Generator().manual_seed(1000 * options.seed + rank)

    with foreshock.attach(model, optimizer, clip=options.clip) as watch:
        for step in range(options.steps):
            due = time.monotonic() + options.seconds_per_step
            starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=batches)
            window = text[starts + torch.arange(CONTEXT + 1)]
            x = nn.functional.one_hot(window[:, :-1], characters).float()
            if step == options.nan_at and rank == 1:
                x[7, 0, 0] = math.nan
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), window[:, 1:].flatten())
            watch.observe(loss=loss, step=step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            warm_up.step()
            # Weights are the same on every rank, so all of them stop at the same step.
            if not model.module.head.bias.isfinite().all():
                break
            time.sleep(max(0.0, due - time.monotonic()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
