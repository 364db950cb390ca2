"""Small training scripts in public styles, written anew. All but the last know nothing of Foreshock.

A script returns its models, and the losses that its optimizers were to step on, by optimizer in the order of their
first steps.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import foreshock
from tests.agent.scenarios.training import WIDTH, batches

STEPS = 6


class Trained(NamedTuple):
    """What a script leaves."""

    models: list[nn.Module]
    losses: list[list[float]]
    watch: foreshock.Watch | None = None
    norms: list[float] | None = None
    """Of its gradients before it changes them, if it does."""


Script = Callable[[], Trained]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


def replicated(**ddp: Any) -> DistributedDataParallel:
    return DistributedDataParallel(layers(), **ddp)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01, **options)


def loss_of(model: Any, data: torch.Generator) -> Tensor:
    x = torch.randn(8, WIDTH, generator=data)
    loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def plain(build: Callable[[], nn.Module] = replicated, **options: Any) -> Trained:
    model, data, losses = build(), batches(), []
    optimizer = adamw(model, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses])


def accumulates(*, without_sync: bool) -> Trained:
    """nanoGPT: micro-batches, the last of which is averaged."""
    model, data, losses = replicated(), batches(), []
    optimizer = adamw(model, fused=True)
    for _ in range(STEPS):
        total = 0.0
        for micro in range(3):
            with model.no_sync() if without_sync and micro < 2 else contextlib.nullcontext():
                loss = loss_of(model, data) / 3
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return Trained([model], [losses])


def scaled(**options: Any) -> Trained:
    """torchvision's references and timm: a scaler, whose first scale is too high, and clipping after unscaling."""
    model, data, losses = replicated(), batches(), []
    optimizer = adamw(model, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            losses.append(loss.item())
    return Trained([model], [losses])


def lbfgs() -> Trained:
    model, data = replicated(), batches()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Trained([model], [])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: climbs, and steps with the gradient from there; `step` is never called."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(parameters, {"rho": 0.05, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["climbed"] = p.grad * (0.05 / (norm + 1e-12))
            p.add_(self.state[p]["climbed"])

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["climbed"])
        self.base.step()


def sam() -> Trained:
    model, data, losses = replicated(), batches(), []
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        for part in (optimizer.climb, optimizer.descend):
            model.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            part()
        losses.append(loss.item())
    return Trained([model], [losses])


def gan() -> Trained:
    """DCGAN: the generator's loss leaves gradients in the discriminator, which are dropped."""
    torch.manual_seed(0)
    generator = DistributedDataParallel(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, WIDTH)))
    discriminator = DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 1)))
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=0.01)
    data, losses = batches(), ([], [])  # type: tuple[torch.Generator, tuple[list[float], list[float]]]
    judge = nn.BCEWithLogitsLoss()
    for _ in range(STEPS):
        real, noise = torch.randn(8, WIDTH, generator=data), torch.randn(8, 4, generator=data)
        discriminator.zero_grad()
        on_real = judge(discriminator(real), torch.ones(8, 1))
        on_real.backward()
        fake = generator(noise)
        on_fake = judge(discriminator(fake.detach()), torch.zeros(8, 1))
        on_fake.backward()
        of_discriminator.step()
        losses[0].append(on_real.item() + on_fake.item())
        generator.zero_grad()
        loss = judge(discriminator(fake), torch.ones(8, 1))
        loss.backward()
        of_generator.step()
        losses[1].append(loss.item())
    return Trained([discriminator, generator], list(losses))


def gradient_penalty() -> Trained:
    """WGAN-GP's critic: a gradient of the gradient by the input is a part of the loss."""
    model, data, losses = replicated(), batches(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.9))
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, WIDTH, generator=data).requires_grad_(True)
        score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses])


def two_losses() -> Trained:
    """Several losses of one forward pass, and one backward pass from all of them."""
    model, data, losses = replicated(), batches(), []
    optimizer = adamw(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, WIDTH, generator=data)
        output = model(x)
        first, second = (output - x.sum(1, keepdim=True)).square().mean(), output.abs().mean()
        torch.autograd.backward([first, second])
        optimizer.step()
        losses.append(first.item() + second.item())
    return Trained([model], [losses])


def average_of_weights() -> Trained:
    """timm and DINO: an exponential moving average of the weights, evaluated in between."""
    model, data, losses = replicated(), batches(), []
    optimizer, average = adamw(model), copy.deepcopy(model.module).eval()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 0.1)
            loss_of(average, torch.Generator().manual_seed(1))
    return Trained([model, average], [losses])


def frozen_teacher() -> Trained:
    """Distillation; the student is the larger model of LoRA's kind: its first layers are frozen too."""
    teacher, student, data, losses = layers().requires_grad_(False), layers(), batches(), []
    student[0].requires_grad_(False)
    model = DistributedDataParallel(student)
    optimizer = adamw(model)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        loss = (model(x) - teacher(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses])


def unfreezes() -> Trained:
    """fastai's stages: more layers, with a new optimizer."""
    model, data = layers(), batches()
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    losses: list[list[float]] = []
    for stage in range(2):
        if stage:
            model[0].requires_grad_(True)
            wrapped = DistributedDataParallel(model)
        optimizer = adamw(model)
        losses.append([])
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(wrapped, data)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses[-1].append(loss.item())
    return Trained([model], losses)


def clips_by_itself() -> Trained:
    model, data, losses = replicated(), batches(), []
    optimizer = adamw(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses])


def checkpointed() -> DistributedDataParallel:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()

        def forward(self, x: Tensor) -> Any:
            x = x.requires_grad_(True)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return x

    return DistributedDataParallel(Recomputed())


def sharded() -> nn.Module:
    model = layers()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer)
    return model


def compiled() -> nn.Module:
    model: nn.Module = torch.compile(replicated(), backend="eager")  # type: ignore[assignment]
    return model


def attaches_by_itself() -> Trained:
    """A script that calls `attach` after its first steps."""
    model, data, losses = replicated(), batches(), []
    optimizer, watch = adamw(model), None
    for step in range(STEPS):
        if step == 2:
            watch = foreshock.attach(model, optimizer, local_norms=False)
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses], watch)


def unwrapped() -> nn.Module:
    return layers()


SCRIPTS: dict[str, Script] = {
    "plain": plain,
    "fused": functools.partial(plain, fused=True),
    "accumulates": functools.partial(accumulates, without_sync=True),
    "accumulates_with_sync": functools.partial(accumulates, without_sync=False),
    "scaled": scaled,
    "scaled_fused": functools.partial(scaled, fused=True),
    "lbfgs": lbfgs,
    "sam": sam,
    "gan": gan,
    "gradient_penalty": gradient_penalty,
    "two_losses": two_losses,
    "average_of_weights": average_of_weights,
    "frozen_teacher": frozen_teacher,
    "unfreezes": unfreezes,
    "clips_by_itself": clips_by_itself,
    "checkpointed": functools.partial(plain, checkpointed),
    "bucket_views": functools.partial(plain, functools.partial(replicated, gradient_as_bucket_view=True)),
    "static_graph": functools.partial(plain, functools.partial(replicated, static_graph=True)),
    "sharded": functools.partial(plain, sharded),
    "compiled": functools.partial(plain, compiled),
    "unwrapped": functools.partial(plain, unwrapped),
    "attaches_by_itself": attaches_by_itself,
}
