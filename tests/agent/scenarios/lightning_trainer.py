"""Scenarios of test_lightning.py: Lightning's Trainer, alone and with our callback. Each rank runs it."""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foreshock import AdaptiveClip
from foreshock.integrations.lightning import ForeshockCallback
from tests.agent.scenarios.training import WIDTH, apart, column, main, same, told

STEPS = 6


class Regression(LightningModule):  # type: ignore[misc]
    """Keeps its losses, and its norms from before any clipping."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 1))
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.fails_at = fails_at

    def training_step(self, x: Tensor, number: int) -> Tensor:
        if number == self.fails_at:
            raise RuntimeError("out of luck")
        loss: Tensor = (self.layers(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
        squares = [p.grad.double().square().sum() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))

    def validation_step(self, x: Tensor) -> None:
        self.layers(x)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self.train_dataloader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Tensor]:
        inputs = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))
        return DataLoader(list(inputs), batch_size=4)  # type: ignore[arg-type]


class Reading(ForeshockCallback):
    """Reads the ring before the training's end closes it."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.found = told(self._watch.watch)
        super().on_train_end(trainer, module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = dict(state_dict)
        super().load_state_dict(state_dict)


def trainer_with(*callbacks: Any, max_steps: int = STEPS, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", strategy="ddp", devices=dist.get_world_size(), max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        default_root_dir=tempfile.mkdtemp(), **options,
    )  # fmt: skip


def beside_alone(
    clip: float | None = None,
    gradient_clip_val: float | None = None,
    accumulated: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """The trainer by itself, then with our callback. clip: Foreshock's, in place of the trainer's."""
    options = {"accumulate_grad_batches": accumulated, "limit_val_batches": 0} | options
    alone, ours = Regression(), Regression()
    trainer_with(gradient_clip_val=gradient_clip_val if clip is None else clip, **options).fit(alone)
    callback = Reading(run="lightning", clip=clip)
    trainer = trainer_with(callback, gradient_clip_val=gradient_clip_val, **options)
    trainer.fit(ours)
    records = callback.found["records"]
    weights = [[p.detach() for p in each.parameters()] for each in (alone, ours)]
    sums = [sum(ours.losses[i : i + accumulated]) / accumulated for i in range(0, len(ours.losses), accumulated)]
    return {
        "same": same(*weights),
        "apart": apart(*weights),
        "norms": ours.norms,
        "sums": sums,
        "global": column(callback.found, "global_norm"),
        "coefficients": column(callback.found, "clip_coefficient"),
        "edited": [record["edited"] for record in records],
        "losses": [record["loss"] for record in records],
        "steps": [record["step"] for record in records],
        "stepped": all(record["stepped"] for record in records),
        "dropped": callback.found["dropped"],
        "left": trainer.gradient_clip_val,
    }


def resumes() -> dict[str, Any]:
    first, second = Reading(clip=AdaptiveClip()), Reading(clip=AdaptiveClip())
    trainer = trainer_with(first)
    trainer.fit(Regression())
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    path = Path(shared[0], "checkpoint")
    trainer.save_checkpoint(path)
    trainer_with(second, max_steps=STEPS + 3).fit(Regression(), ckpt_path=path)
    return {
        "history": first.state_dict() == second.loaded != {},
        "steps": [record["step"] for record in second.found["records"]],
    }


def fails() -> dict[str, Any]:
    callback = Reading(clip=0.5)
    trainer = trainer_with(callback, gradient_clip_val=1.0)
    try:
        trainer.fit(Regression(fails_at=3))
    except RuntimeError as error:
        message = str(error)
    return {"error": message, "enabled": callback._watch.watch.enabled, "left": trainer.gradient_clip_val}


class Detaching(ForeshockCallback):
    """Ends the watch before the fourth step, and notes by what the trainer clips after each."""

    def __init__(self) -> None:
        super().__init__(clip=0.5)
        self.clip_vals: list[float | None] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        if number == 3:
            self._watch.watch.detach()
        super().on_train_batch_start(trainer, module, batch, number)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.clip_vals.append(trainer.gradient_clip_val)


def detached_meanwhile() -> dict[str, Any]:
    callback = Detaching()
    trainer = trainer_with(callback, gradient_clip_val=1.0)
    trainer.fit(Regression())
    return {"clip_vals": callback.clip_vals, "left": trainer.gradient_clip_val}


SCENARIOS: dict[str, Callable[[], Any]] = {
    "observed": beside_alone,
    "clips": functools.partial(beside_alone, gradient_clip_val=0.5),
    "accumulates": functools.partial(beside_alone, accumulated=2),
    "validates": functools.partial(beside_alone, val_check_interval=2, limit_val_batches=2),
    "taken_over": functools.partial(beside_alone, clip=0.5, gradient_clip_val=1.0),
    "taken_over_from_none": functools.partial(beside_alone, clip=0.5),
    "resumes": resumes,
    "fails": fails,
    "detached_meanwhile": detached_meanwhile,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(SCENARIOS)
