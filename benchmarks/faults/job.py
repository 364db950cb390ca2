"""One rank of one case: an ordinary DDP script, with `foreshock.attach` and a fault put in."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import foreshock
from benchmarks.faults.cases import Case
from benchmarks.faults.causes import fault_of
from benchmarks.faults.models import build
from benchmarks.faults.tasks import Task

_TIME_OUT = timedelta(seconds=60)
_STEPS_AFTER = 3
"""Steps that a job goes on after its weights are no longer finite."""


def train(case: Case, rank: int, store: str, collector: str) -> None:
    """store: path of a file by which the ranks meet."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
    torch.manual_seed(case.seed)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.ranks, timeout=_TIME_OUT)
    try:
        fault = fault_of(case, rank)
        task = Task(
            case.model,
            case.loss,
            seed=case.seed,
            stream=fault.stream(),
            length=case.length,
            noise=case.noise,
            tail=case.tail,
        )
        saved = None
        for end in (*case.relaunches, case.steps):
            module = build(case.model, task.outputs)
            fault.model(module)
            model = DistributedDataParallel(module, find_unused_parameters=False)
            optimizer = _optimizer(case, model)
            with foreshock.attach(
                model, optimizer, clip=case.clip, collector=collector, run=case.name, experiment="faults"
            ) as watch:
                saved = Loop(case, rank, fault, task, model, optimizer, watch).run(saved, end)
    finally:
        dist.destroy_process_group()


def _optimizer(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if case.optimizer == "lion":
        return Lion(parameters, case.rate)
    if case.optimizer == "muon":
        return Muon(parameters, case.rate)
    if case.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=case.rate, fused=True)
    momentum = 0.9 if case.optimizer == "momentum" else 0.0
    return torch.optim.SGD(parameters, lr=case.rate, momentum=momentum, fused=True)


class Lion(torch.optim.Optimizer):
    """Moves each weight by the rate, against the sign of the momentum (Chen et al., *Symbolic Discovery of Optimization
    Algorithms*, 2023)."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * momentum.lerp(parameter.grad, 0.1).sign())
                momentum.lerp_(parameter.grad, 0.01)


class Muon(torch.optim.Optimizer):
    """Moves a matrix by the rate, along its orthogonalized momentum (Jordan, *Muon*, 2024); other weights as Lion."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.95).add_(parameter.grad)
                ahead = momentum.mul(0.95).add_(parameter.grad)
                if parameter.dim() < 2:
                    parameter.sub_(0.1 * group["lr"] * ahead.sign())
                    continue
                matrix = ahead.flatten(1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.sub_(group["lr"] * scale * orthogonal(matrix).reshape_as(parameter))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with singular values near 1, by five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    near: torch.Tensor = x.T if tall else x
    return near


class Loop:
    """The steps of one attempt of a job."""

    def __init__(
        self, case: Case, rank: int, fault: Any, task: Task, model: Any, optimizer: Any, watch: foreshock.Watch
    ) -> None:
        self.case, self.rank, self.fault, self.task = case, rank, fault, task
        self.model, self.optimizer, self.watch = model, optimizer, watch
        half = case.precision == "fp16"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=case.loss_scale, enabled=half)
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
        kind = kinds.get(case.precision)
        self.cast = nullcontext() if kind is None else torch.autocast("cpu", dtype=kind)
        self.saved: dict[str, Any]

    def run(self, saved: dict[str, Any] | None, end: int) -> dict[str, Any]:
        """Train up to step `end`, from a checkpoint if there is one; return the last checkpoint."""
        case, spoilt, step = self.case, 0, 0
        if saved is None:
            self.saved = self._state(step)
        else:
            self.saved, step = saved, saved["step"]
            self._restore()
        while step < end:
            for group in self.optimizer.param_groups:
                group["lr"] = case.rate_at(step)
            self.fault.process(step)
            self._step(step)
            self.fault.weights(step, self.model)
            step += 1
            if case.checkpoint_every and step % case.checkpoint_every == 0 and self._finite():
                self.saved = self._state(step)
            if not self._finite():
                spoilt += 1
                if case.checkpoint_every:
                    self._restore()
                elif spoilt > _STEPS_AFTER:
                    break
            if step in case.restarts:
                self._restore()
        return self.saved

    def _step(self, step: int) -> None:
        case, total = self.case, None
        pieces = case.pieces_at(step)
        for piece in range(pieces):
            x, target = self.fault.batch(step, self.task.batch(case.batch_at(step)))
            last = piece == pieces - 1
            with nullcontext() if last else self.model.no_sync():
                with self.cast:
                    output = self.model(x)
                loss = self.task.value(output.float(), target)
                loss = self.fault.loss(step, output.float(), target, loss) / pieces
                total = loss.detach() if total is None else total + loss.detach()
                self.scaler.scale(loss).backward()
        if self.fault.observes(step):
            self.watch.observe(loss=total, step=step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _finite(self) -> bool:
        """Weights are alike on all ranks, so all ranks decide alike."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _state(self, step: int) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
        return copy.deepcopy(state)

    def _restore(self) -> None:
        """From the last checkpoint."""
        saved = copy.deepcopy(self.saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
