"""Scenarios of test_transformers.py: Hugging Face's Trainer, alone and with our callback. Each rank runs it."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from foreshock.integrations.transformers import ForeshockCallback
from tests.agent.scenarios.training import WIDTH, apart, column, main, same, told

STEPS = 6
DEFAULTS = {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True}


class Regression(nn.Module):
    """A model as the trainer takes it: its output has the loss."""

    def __init__(self, fails_at: int | None = None, nan_pass: int | None = None, nan_input: int | None = None) -> None:
        """fails_at: forward passes before the one that raises, once. nan_pass: that with a NaN gradient, from 1.
        nan_input: forward passes before the one whose input is NaN.
        """
        super().__init__()
        self.fails_at, self.nan_pass, self.nan_input, self.passes = fails_at, nan_pass, nan_input, 0
        torch.manual_seed(0)
        first = nn.Linear(WIDTH, 24)
        self.layers = nn.Sequential(first, nn.Tanh(), nn.Linear(24, 1))
        first.weight.register_hook(self._spoiled)  # type: ignore[no-untyped-call]

    def _spoiled(self, gradient: Tensor) -> Tensor:
        return gradient * (math.nan if self.passes == self.nan_pass else 1.0)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.passes == self.fails_at:
            self.fails_at = None
            raise RuntimeError("out of luck")
        if self.passes == self.nan_input:
            x = x * math.nan
        self.passes += 1
        output = self.layers(x)
        return {"loss": (output - labels).square().mean(), "logits": output}


class Reading(ForeshockCallback):
    """Reads the ring before the training's end closes it."""

    def on_train_end(self, *arguments: Any, **options: Any) -> None:
        self.found = told(self._watch.watch)
        super().on_train_end(*arguments, **options)


def trainer_with(*callbacks: Any, model: nn.Module | None = None, **options: Any) -> transformers.Trainer:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, WIDTH, generator=generator)
    arguments = transformers.TrainingArguments(
        use_cpu=True, ddp_backend="gloo", logging_steps=1,
        per_device_train_batch_size=4, learning_rate=0.01, report_to=[], remove_unused_columns=False,
        **(DEFAULTS | {"output_dir": tempfile.mkdtemp()} | options),
    )  # fmt: skip
    data = [{"x": x, "labels": x.sum().reshape(1)} for x in inputs]
    return transformers.Trainer(
        model or Regression(), arguments, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks)
    )


def trained(*callbacks: Any, **options: Any) -> transformers.Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.train()
    return trainer


@contextlib.contextmanager
def norms_before_step(norms: list[float]) -> Iterator[None]:
    """Append the norm of the gradients that the trainer steps with, before Foreshock clips them."""

    def before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        hook.remove()


def beside_alone(clip: float | None = None, max_grad_norm: float = 1.0, **options: Any) -> dict[str, Any]:
    """The trainer by itself, then with our callback. clip: Foreshock's, in place of the trainer's."""
    norms: tuple[list[float], list[float]] = ([], [])
    with norms_before_step(norms[0]):
        alone = trained(max_grad_norm=max_grad_norm if clip is None else clip, **options)
    callback = Reading(run="trainer", clip=clip)
    with norms_before_step(norms[1]):
        ours = trained(callback, max_grad_norm=max_grad_norm, **options)
    weights = [[p.detach() for p in each.model.parameters()] for each in (alone, ours)]
    logs = [[row for row in each.state.log_history if "loss" in row] for each in (alone, ours)]
    # With `max_grad_norm=0`, older trainers log no norm.
    rows = [[{n: float(row.get(n, norm)) for n in ("loss", "grad_norm")} for row, norm in zip(log, each, strict=True)]
            for log, each in zip(logs, norms, strict=True)]  # fmt: skip
    return {
        "same": same(*weights),
        "apart": apart(*weights),
        "same logs": rows[0] == rows[1],
        "alone's norms": [row["grad_norm"] for row in rows[0]],
        "norms": [row["grad_norm"] for row in rows[1]],
        "logged": [row["loss"] for row in rows[1]],
        "global": column(callback.found, "global_norm"),
        "coefficients": column(callback.found, "clip_coefficient"),
        "edited": [record["edited"] for record in callback.found["records"]],
        "losses": [record["loss"] for record in callback.found["records"]],
        "steps": [record["step"] for record in callback.found["records"]],
        "stepped": all(record["stepped"] for record in callback.found["records"]),
        "dropped": callback.found["dropped"],
        "left": ours.args.max_grad_norm,
    }


def fails_first() -> dict[str, Any]:
    """A training that raises, and is started again."""
    callback = Reading(clip=0.5)
    model = Regression(fails_at=3)
    trainer = trainer_with(callback, model=model, max_grad_norm=1.0, save_strategy="steps", save_steps=3)
    try:
        trainer.train()
    except RuntimeError as error:
        message = str(error)
    first = callback._watch.watch
    trainer.train()
    return {
        "error": message,
        "detached": not first.enabled,
        "coefficients": column(callback.found, "clip_coefficient"),
        "norms": column(callback.found, "global_norm"),
        "left": trainer.args.max_grad_norm,
        "saved": [
            torch.load(path, weights_only=False).max_grad_norm
            for path in sorted(Path(trainer.args.output_dir).rglob("training_args.bin"))
        ],
    }


class Detaching(ForeshockCallback):
    """Ends the watch before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, *arguments: Any, **options: Any) -> None:
        if state.global_step == 3:
            self._watch.watch.detach()
        super().on_step_begin(args, state, *arguments, **options)


def detached_meanwhile() -> dict[str, Any]:
    norms: list[float] = []
    with norms_before_step(norms):
        trainer = trained(Detaching(clip=0.2), max_grad_norm=0.1)
    return {"norms": norms, "left": trainer.args.max_grad_norm}


def shows_progress() -> None:
    """The trainer clips, which is worth a line in the middle of the training; its bar is on standard error too."""
    trained(ForeshockCallback(), max_grad_norm=0.1, disable_tqdm=False)


def one_nan() -> dict[str, Any]:
    """A gradient that is NaN in one layer, at the third step; the trainer's own clipping makes all of them NaN."""
    callback = Reading(clip=0.5)
    trainer_with(callback, model=Regression(nan_pass=3)).train()
    return {name: column(callback.found, name)[2] for name in ("global_nan_parameters", "first_nonfinite_global")}


SCENARIOS: dict[str, Callable[[], Any]] = {
    "clips": beside_alone,
    "clips_nothing": functools.partial(beside_alone, max_grad_norm=0.0),
    "accumulates": functools.partial(beside_alone, gradient_accumulation_steps=3),
    "evaluates": functools.partial(beside_alone, eval_strategy="steps", eval_steps=2),
    "taken_over": functools.partial(beside_alone, clip=0.5),
    "taken_over_from_none": functools.partial(beside_alone, clip=0.5, max_grad_norm=0.0),
    "fails_first": fails_first,
    "one_nan": one_nan,
    "detached_meanwhile": detached_meanwhile,
    "shows_progress": shows_progress,
}

if __name__ == "__main__":
    main(SCENARIOS)
