"""Training loops in the styles of well-known repositories, written anew, which change gradients before their step.

Each also returns the norms of its gradients from before that.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.agent.scenarios.scripts import STEPS, Script, Trained, adamw, layers, loss_of, replicated
from tests.agent.scenarios.training import WIDTH, batches


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def norm_of(model: nn.Module) -> float:
    """The total norm of its gradients, in float64."""
    return float(torch.stack([g.double().square().sum() for g in gradients(model)]).sum().sqrt())


def nanogpt() -> Trained:
    """Groups with and without decay, micro-batches, a scaler that is not enabled, warm-up, clipping at 1."""
    model, data, losses, norms = replicated(), batches(), [], []
    groups = [[p for p in model.parameters() if (p.dim() > 1) is decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], fused=True
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / (STEPS + 1)
        total = 0.0
        for micro in range(2):
            model.require_backward_grad_sync = micro == 1
            loss: Any = loss_of(model, data) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return Trained([model], [losses], norms=norms)


def mingpt() -> Trained:
    """`model.zero_grad` after the forward pass, and clipping at 1."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95))
    for _ in range(STEPS):
        loss: Any = loss_of(model, data)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


def dino() -> Trained:
    """A teacher that follows the student, clipping of each parameter through `.data`, a head frozen at first."""
    model, data, losses, norms = replicated(), batches(), [], []
    teacher = copy.deepcopy(model.module).requires_grad_(False)
    optimizer = adamw(model)
    center = torch.zeros(1, 1)
    for step in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        target, output = teacher(x), model(x + 0.1)
        loss: Any = (output - (target - center) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(norm_of(model))
        for gradient in gradients(model):
            coefficient = 0.3 / (gradient.data.norm(2) + 1e-6)
            if coefficient < 1:
                gradient.data.mul_(coefficient)
        if step < 2:
            for p in model.module[4].parameters():
                p.grad = None
        optimizer.step()
        with torch.no_grad():
            mean = target.mean(0, keepdim=True)
            dist.all_reduce(mean)
            center = center * 0.9 + mean / dist.get_world_size() * 0.1
            for followed, p in zip(teacher.parameters(), model.module.parameters(), strict=True):
                followed.mul_(0.99).add_(0.01 * p.detach())
        losses.append(loss.item())
    return Trained([model, teacher], [losses], norms=norms)


def mae() -> Trained:
    """A class around the scaler, which unscales and clips; micro-batches that all average; a rate for each of them."""

    class Scaler:
        def __init__(self) -> None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)

        def __call__(self, loss: Any, optimizer: torch.optim.Optimizer, *, steps: bool) -> None:
            self.scaler.scale(loss).backward()
            if steps:
                self.scaler.unscale_(optimizer)
                norms.append(norm_of(model))
                nn.utils.clip_grad_norm_(model.parameters(), 0.7)
                self.scaler.step(optimizer)
                self.scaler.update()

    norms: list[float] = []
    model, data, losses = replicated(), batches(), []
    optimizer, scaler, total = adamw(model, betas=(0.9, 0.95)), Scaler(), 0.0
    optimizer.zero_grad()
    for micro in range(2 * STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 * math.cos(micro / STEPS)
        loss: Any = loss_of(model, data)
        total += loss.item() / 2
        scaler(loss / 2, optimizer, steps=micro % 2 == 1)
        if micro % 2:
            optimizer.zero_grad()
            losses.append(total)
            total = 0.0
    return Trained([model], [losses], norms=norms)


def detr() -> Trained:
    """A lower rate for the backbone, weighted losses, an exit on a loss that is not finite, clipping at 0.1."""
    model, data, losses, norms = replicated(), batches(), [], []
    backbone = list(model.module[0].parameters())
    others = [p for p in model.parameters() if not any(p is each for each in backbone)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": backbone, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        output = model(x)
        parts = {"class": output.square().mean(), "box": functional.l1_loss(output, x.sum(1, keepdim=True))}
        loss: Any = sum(weight * parts[name] for name, weight in (("class", 1.0), ("box", 5.0)))
        reduced = loss.detach().clone()
        dist.all_reduce(reduced)
        if not math.isfinite(reduced.item()):
            sys.exit(1)
        optimizer.zero_grad()
        loss.backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


def timm() -> Trained:
    """Adaptive gradient clipping, unit by unit, with copies into the gradients; an average of the weights."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer, average = adamw(model), copy.deepcopy(model.module)

    def unit_norm(x: Tensor) -> Any:
        return x.norm(dim=tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x.norm()

    for _ in range(STEPS):
        loss: Any = loss_of(model, data)
        optimizer.zero_grad()
        loss.backward()
        norms.append(norm_of(model))
        for p, gradient in zip(model.parameters(), gradients(model), strict=True):
            limit = unit_norm(p.detach()).clamp_(min=1e-3) * 0.01
            norm = unit_norm(gradient.detach())
            clipped = gradient.detach() * (limit / norm.clamp(min=1e-6))
            gradient.detach().copy_(torch.where(norm < limit, gradient.detach(), clipped))
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(average.state_dict().values(), model.module.state_dict().values(), strict=True):
                mean.copy_(mean * 0.9 + p * 0.1)
        losses.append(loss.item())
    return Trained([model, average], [losses], norms=norms)


def torchvision() -> Trained:
    """SGD with momentum and warm-up, a scaler with clipping after unscaling, an average with buffers."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 2)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, decay], milestones=[2])
    average = torch.optim.swa_utils.AveragedModel(model.module, use_buffers=True)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(STEPS):
        loss: Any = loss_of(model, data)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model.module)
        schedule.step()
        losses.append(loss.item())
    return Trained([model, average], [losses], norms=norms)


def fairseq() -> Trained:
    """Losses are sums over samples: gradients are multiplied by ranks over samples, and clipped after that."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.98))
    for step in range(STEPS):
        optimizer.zero_grad()
        total, samples = 0.0, torch.zeros(())
        for micro in range(2):
            with model.no_sync() if micro == 0 else contextlib.nullcontext():
                x = torch.randn(4 + step, WIDTH, generator=data)
                loss: Any = (model(x) - x.sum(1, keepdim=True)).square().sum()
                loss.backward()
            total, samples = total + loss.item(), samples + len(x)
        dist.all_reduce(samples)
        norms.append(norm_of(model))
        for gradient in gradients(model):
            gradient.mul_(dist.get_world_size() / samples)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(total)
    return Trained([model], [losses], norms=norms)


def ppo() -> Trained:
    """CleanRL: epochs over mini-batches of one roll-out, a loss of policy, value and entropy, a rate that falls."""

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()[:4]
            self.actor, self.critic = nn.Linear(24, 3), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x)
            return self.actor(hidden), self.critic(hidden).flatten()

    torch.manual_seed(0)
    model, data, losses, norms = DistributedDataParallel(Agent()), batches(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-3, eps=1e-5)
    for update in range(2):
        optimizer.param_groups[0]["lr"] = 2.5e-3 * (1 - update / 2)
        seen = torch.randn(24, WIDTH, generator=data)
        with torch.no_grad():
            scores, values = model.module(seen)
            actions = torch.multinomial(scores.softmax(1), 1, generator=data).flatten()
            policy: Any = torch.distributions.Categorical(logits=scores)
            before = policy.log_prob(actions)
            returns = seen.sum(1)
            advantages = returns - values
        for rows in torch.randperm(24, generator=data).chunk(3):
            scores, values = model(seen[rows])
            policy = torch.distributions.Categorical(logits=scores)
            ratio = (policy.log_prob(actions[rows]) - before[rows]).exp()
            gain = (advantages[rows] - advantages[rows].mean()) / (advantages[rows].std() + 1e-8)
            of_policy = torch.max(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).mean()
            of_value = 0.5 * (values - returns[rows]).square().mean()
            loss: Any = of_policy - 0.01 * policy.entropy().mean() + 0.5 * of_value
            optimizer.zero_grad()
            loss.backward()
            norms.append(norm_of(model))
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


def lora() -> Trained:
    """Low-rank factors beside frozen weights; clipping of what is trained."""

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner.requires_grad_(False)
            self.down = nn.Parameter(torch.randn(2, inner.in_features) * 0.1)
            self.up = nn.Parameter(torch.zeros(inner.out_features, 2))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x) + functional.linear(functional.linear(x, self.down), self.up) * 2
            return result

    inner = layers()
    for index in (0, 2, 4):
        inner[index] = Adapted(inner[index])  # type: ignore[arg-type]
    model, data, losses, norms = DistributedDataParallel(inner), batches(), [], []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
    for _ in range(STEPS):
        loss: Any = loss_of(model, data)
        loss.backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


def distillation() -> Trained:
    """DistilBERT: losses of the teacher's scores and of hidden states, and clipping."""
    teacher = layers().eval().requires_grad_(False)
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer = adamw(model)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        with torch.no_grad():
            target = teacher(x) + 1
        output = model(x)
        loss: Any = 5.0 * functional.smooth_l1_loss(output, target)
        loss += 1.0 - functional.cosine_similarity(output, target, dim=0).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


def byol() -> Trained:
    """Two views of a batch through one network, an average as target; gradients divided by the mean of their norms."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer, target = adamw(model), copy.deepcopy(model.module).requires_grad_(False)
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH, generator=data)
        first, second = x + 0.1, x * 0.9
        with torch.no_grad():
            targets = target(torch.cat([second, first]))
        loss: Any = (model(torch.cat([first, second])) - targets - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(norm_of(model))
        for gradient in gradients(model):
            gradient.div_(gradient.norm() + 1.0)
        optimizer.step()
        with torch.no_grad():
            for followed, p in zip(target.parameters(), model.module.parameters(), strict=True):
                followed.lerp_(p, 0.01)
        losses.append(loss.item())
    return Trained([model, target], [losses], norms=norms)


def logs_norms() -> Trained:
    """A clipping call for the norm that it returns, every second step."""
    model, data, losses, norms = replicated(), batches(), [], []
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss: Any = loss_of(model, data)
        loss.backward()
        norms.append(norm_of(model))
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        losses.append(loss.item())
    return Trained([model], [losses], norms=norms)


PUBLIC_SCRIPTS: dict[str, Script] = {
    "nanogpt": nanogpt,
    "mingpt": mingpt,
    "dino": dino,
    "mae": mae,
    "detr": detr,
    "timm": timm,
    "torchvision": torchvision,
    "fairseq": fairseq,
    "ppo": ppo,
    "lora": lora,
    "distillation": distillation,
    "byol": byol,
    "logs_norms": logs_norms,
}
