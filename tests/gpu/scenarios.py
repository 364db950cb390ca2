"""Trainings for the tests of this folder, on a card or, to try the script itself, on a CPU.

    torchrun --nproc-per-node 1 scenarios.py DEVICE BACKEND RESULT NAME...

A scenario is a function of the device that every rank runs. What it returns is rank 0's result, as JSON. Records stay
in the rings, one file for each run and rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import foreshock

STEPS = 20
MAX_NORM = 0.05
NAN_STEP = 30
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-unfused": {"fused": False},
    "sgd": {"kind": "SGD", "momentum": 0.9},
    "adam-scaled": {"kind": "Adam", "scaled": True},
    "adamw-bfloat16": {"dtype": torch.bfloat16},
    "adamw-views": {"views": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "observe": {},
    "clip": {"clip": MAX_NORM},
    "global": {"clip": MAX_NORM, "local_norms": False},
    "adaptive-skip": {"clip": foreshock.AdaptiveClip(max_norm=MAX_NORM), "skip": True},
}


def model_on(device: torch.device, *, dtype: torch.dtype = torch.float32, views: bool = False) -> Any:
    """The same weights each time, in several buckets."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))
    return DistributedDataParallel(layers.to(device, dtype), bucket_cap_mb=0.02, gradient_as_bucket_view=views)


def optimizer_of(model: nn.Module, kind: str = "AdamW", *, fused: bool = True, **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, fused=fused, **options)
    return optimizer


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watch: foreshock.Watch | None,
    *,
    steps: int = STEPS,
    scaled: bool = False,
    nan_at: int = -1,
    clip: Callable[[], Any] = lambda: None,
) -> None:
    """Train on random batches. nan_at: step whose batch has a NaN on the last rank. clip: called before each step."""
    parameter = next(model.parameters())
    device = parameter.device
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=scaled)
    torch.manual_seed(7 + dist.get_rank())
    for step in range(steps):
        x = torch.randn(32, 64, device=device, dtype=parameter.dtype)
        if step == nan_at and dist.get_rank() == dist.get_world_size() - 1:
            x[0, 0] = float("nan")
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16, enabled=scaled):
            loss = model(x).float().square().mean()
        if watch is not None:
            watch.observe(loss=loss.detach(), step=step)
        scaler.scale(loss).backward()
        if watch is None:
            scaler.unscale_(optimizer)
            clip()
        scaler.step(optimizer)
        scaler.update()


def apart(left: nn.Module, right: nn.Module) -> float:
    """Largest difference of a weight, relative to the largest weight of its parameter."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def parity(device: torch.device) -> dict[str, Any]:
    """Beside stock clipping: how far the weights are apart in the end, and stock's norms."""
    found = {}
    for name, case in CASES.items():
        options = dict(case)
        scaled = options.pop("scaled", False)
        of_model = {key: options.pop(key) for key in ("dtype", "views") if key in options}
        stock, ours = model_on(device, **of_model), model_on(device, **of_model)
        norms: list[Tensor] = []

        def clip(stock: nn.Module = stock, norms: list[Tensor] = norms) -> None:
            norms.append(nn.utils.clip_grad_norm_(stock.parameters(), MAX_NORM))

        train(stock, optimizer_of(stock, **options), None, scaled=scaled, clip=clip)
        optimizer = optimizer_of(ours, **options)
        watch = foreshock.attach(ours, optimizer, run=f"parity-{name}", clip=MAX_NORM)
        train(ours, optimizer, watch, scaled=scaled)
        kernels = type(vars(watch)["_measure"]).__name__ == "KernelMeasure"
        watch.detach()
        found[name] = {"apart": apart(stock, ours), "norms": [float(norm) for norm in norms], "kernels": kernels}
    return found


def no_sync(device: torch.device) -> list[str]:
    """Steps during which PyTorch raises where the host would wait for the device; the settings that were tried."""
    for name, setting in SETTINGS.items():
        model = model_on(device)
        optimizer = optimizer_of(model)
        watch = foreshock.attach(model, optimizer, run=f"no-sync-{name}", **setting)
        # Kernels are compiled, and buckets rebuilt.
        train(model, optimizer, watch, steps=5)
        data = torch.randn(32, 64, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            # Two and a half times as long as the weights are left alone.
            for step in range(250):
                optimizer.zero_grad()
                loss = model(data).square().mean()
                watch.observe(loss=loss.detach(), step=step)
                loss.backward()
                optimizer.step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        watch.detach()
    return list(SETTINGS)


def sharded(device: torch.device) -> dict[str, Any]:
    """Beside stock clipping, a model that `fully_shard` has sharded; from the fifth step on, no wait for the device."""
    found: dict[str, Any] = {}
    models = []
    for stock in (True, False):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))
        model: Any = layers.to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = optimizer_of(model)
        watch = None if stock else foreshock.attach(model, optimizer, run="sharded", clip=MAX_NORM, skip=True)
        norms: list[Any] = []

        def clip(model: nn.Module = model, norms: list[Any] = norms) -> None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))

        train(model, optimizer, watch, steps=5, clip=clip)
        if device.type == "cuda" and not stock:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, optimizer, watch, steps=STEPS, clip=clip)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        if watch is None:
            found["norms"] = [float(norm.full_tensor()) for norm in norms]
        else:
            watch.detach()
        models.append([parameter.full_tensor() for parameter in model.parameters()])
    found["apart"] = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*models, strict=True))
    return found


def skip(device: torch.device) -> dict[str, Any]:
    """A NaN in one batch of many, with steps that may be skipped."""
    model = model_on(device)
    optimizer = optimizer_of(model)
    watch = foreshock.attach(model, optimizer, run="skip", clip=MAX_NORM, skip=True)
    train(model, optimizer, watch, steps=NAN_STEP + 10, nan_at=NAN_STEP)
    watch.detach()
    return {"finite": all(bool(p.isfinite().all()) for p in model.parameters()), "tripped": watch.tripped}


def blame(device: torch.device) -> dict[str, Any]:
    """A NaN in the last rank's batch, and nothing that stops it."""
    model = model_on(device)
    optimizer = optimizer_of(model)
    watch = foreshock.attach(model, optimizer, run="blame", clip=MAX_NORM)
    train(model, optimizer, watch, steps=NAN_STEP + 3, nan_at=NAN_STEP)
    watch.detach()
    return {}


def crash(device: torch.device) -> None:
    """SIGKILL when the device has finished step `STEPS`."""
    model = model_on(device)
    optimizer = optimizer_of(model)
    watch = foreshock.attach(model, optimizer, run="crash", clip=MAX_NORM)
    train(model, optimizer, watch, steps=STEPS)
    if device.type == "cuda":
        torch.cuda.synchronize()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the scenarios of the command line."""
    name, backend, result, *names = sys.argv[1:]
    device = torch.device(name)
    if device.type == "cuda":
        # Ranks share the card.
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    scenarios = (parity, no_sync, sharded, skip, blame, crash)
    known: dict[str, Callable[[torch.device], Any]] = {scenario.__name__: scenario for scenario in scenarios}
    found = {each: known[each](device) for each in names}
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
