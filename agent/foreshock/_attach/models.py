"""Which models and optimizers can be watched, and what is known of one before any hook: the rest is refused."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foreshock._arithmetic.parameters import ParameterPlan, plan_parameters, trainable
from foreshock._errors import SettingsError
from foreshock._output.leaving import is_watched
from foreshock._torch import uncompiled

Placed = tuple[Any, tuple[Any, ...]]
"""Device mesh and placements of a DTensor."""


@dataclass(frozen=True, kw_only=True)
class WatchedModel:
    """Describes the model to be watched."""

    root: nn.Module
    """The DDP model, the root of a sharded one, or the model of a process that trains alone."""
    module: nn.Module
    """The script's own module, whose parameters are measured."""
    ddp: DistributedDataParallel | None = None
    """The DDP model; None for one that is sharded by `fully_shard` or trained by a single process."""
    sharded: bool = False
    """Whether `fully_shard` has sharded it."""
    group: dist.ProcessGroup | None = None
    """All ranks that train it; None for a process that trains alone."""
    replicas: int = 1
    """Ranks that hold the same shard; 1 for DDP."""

    @property
    def ranks(self) -> int:
        """Number of ranks that train it."""
        return 1 if self.group is None else self.group.size()


def group_of(model: nn.Module) -> dist.ProcessGroup:
    """Return the ranks that must agree to watch a model; for one that cannot be watched, all ranks: they must learn."""
    inner = _unwrapped(model)
    group: dist.ProcessGroup | None = getattr(inner, "process_group", None)
    if group is None and is_sharded(inner):
        placed = {_placed(parameter) for parameter in _resharded(inner).parameters()}
        meshes = {mesh for mesh, _ in filter(None, placed)}
        if len(meshes) == 1 and (mesh := meshes.pop()).ndim == 1:
            group = mesh.get_group()
    world = dist.group.WORLD
    assert world is not None
    return group or world


def sharded_parameters(model: WatchedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a sharded model that are shards, frozen ones too, by name."""
    return {name: parameter for name, parameter in model.module.named_parameters() if _placed(parameter) is not None}


def checked_model(model: nn.Module) -> WatchedModel:
    """Return what is known of a model; raise `SettingsError` if it cannot be watched."""
    inner = _unwrapped(model)
    if is_sharded(inner):
        watched = _checked_shards(inner)
    elif isinstance(inner, DistributedDataParallel):
        watched = WatchedModel(root=inner, module=inner.module, ddp=inner, group=inner.process_group)
    elif why := _why_not_watched(inner):
        raise SettingsError(why)
    else:
        watched = WatchedModel(root=inner, module=inner)
    if any(getattr(module, "sparse", False) is True for module in watched.module.modules()):
        raise SettingsError(
            "model: has an embedding with sparse gradients, whose norm is not measured; use sparse=False"
        )
    if any(parameter.is_complex() for parameter in watched.module.parameters()):
        raise SettingsError(
            "model: has complex parameters, whose gradients are not measured; store them as torch.view_as_real"
        )
    return watched


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that steps inside the wrapper of a trainer: Accelerate's, Lightning's or Fabric's."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, torch.optim.Optimizer) and inner.param_groups is optimizer.param_groups:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def checked_plan(model: WatchedModel, optimizer: torch.optim.Optimizer) -> ParameterPlan:
    """Return the plan of what is measured; raise `SettingsError` if the optimizer cannot be watched."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingsError(f"optimizer: must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise SettingsError("optimizer: ZeroRedundancyOptimizer ignores hooks; use a plain optimizer")
    plan = plan_parameters(model.module, optimizer, () if model.ddp is None else model.ddp.parameters_to_ignore)
    if not plan.parameters:
        raise SettingsError("optimizer: holds none of the model's parameters; create it from model.parameters()")
    if others := set(trainable(optimizer)) - set(model.module.parameters()):
        kind = "sharded" if model.sharded else "DDP"
        why = "" if model.group is None else f", whose gradients this {kind} model does not average"
        raise SettingsError(
            f"optimizer: holds {len(others)} parameter(s) of another model{why}; give each model its own optimizer"
        )
    devices = {parameter.device for parameter in plan.parameters}
    if len(devices) > 1:
        raise SettingsError(f"model: its parameters are on {len(devices)} devices; Foreshock supports one per rank")
    if is_watched(optimizer):
        raise SettingsError("optimizer: is already watched; detach that watch first")
    if is_watched(model.root):
        raise SettingsError(
            "model: is already watched with another optimizer, and only one can be watched at a time; attach to the "
            "one that matters, or detach that watch first"
        )
    return plan


def is_sharded(module: object) -> bool:
    """Return whether `fully_shard` was applied to a module."""
    # Not imported here: that would take most of the time of `attach`, and a script that shards has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def trains_alone() -> bool:
    """Return whether this process is the only one of its job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() == 1
    return os.environ.get("WORLD_SIZE", "1") in ("", "1")


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` and Lightning's Fabric wrap, in any order."""
    inner = model
    while (wrapped := uncompiled(getattr(inner, "_forward_module", inner))) is not inner:
        inner = wrapped
    return inner


def _why_not_watched(model: object) -> str:
    """Return why a model that is neither DDP nor sharded is not watched; empty if this process trains it alone."""
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(model).__mro__):
        return "model: FullyShardedDataParallel flattens parameters, so layers cannot be measured; use fully_shard"
    if isinstance(model, nn.Module) and any(map(is_sharded, model.modules())):
        return "model: fully_shard was applied only to parts of it; apply it to the whole model too, last"
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        return f"model: must be a torch.nn.Module, not {kind}"
    if trains_alone():
        return ""
    return f"model: must be a DistributedDataParallel, not {kind}; wrap it first: DistributedDataParallel(model)"


def _checked_shards(model: nn.Module) -> WatchedModel:
    parameters = [parameter for parameter in _resharded(model).parameters() if parameter.requires_grad]
    placed = {_placed(parameter) for parameter in parameters}
    if None in placed:
        raise SettingsError(
            "model: has parameters that fully_shard ignores, whose gradients differ between ranks; shard or freeze them"
        )
    if len({mesh for mesh, _ in filter(None, placed)}) != 1:
        raise SettingsError("model: its parameters are on several device meshes; Foreshock supports one")
    for mesh, placements in filter(None, placed):
        if not placements[-1].is_shard() or len(placements) > 2 or not all(p.is_replicate() for p in placements[:-1]):
            raise SettingsError(
                "model: other parallelism than fully_shard places its parameters, which is not supported"
            )
        if any(parameter.device.type != mesh.device_type for parameter in parameters):
            raise SettingsError("model: keeps its shards on the CPU, away from the mesh; use no offload_policy")
        if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
            raise SettingsError("model: its mesh of replicas and shards must contain every rank of the job")
    group = group_of(model)
    return WatchedModel(root=model, module=model, sharded=True, group=group, replicas=group.size() // mesh.shape[-1])


def _resharded(model: nn.Module) -> nn.Module:
    """Return a sharded model with its parameters as the optimizer holds them: after a forward pass, some are whole.

    The next forward pass gathers them again.
    """
    for module in filter(is_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]
    return model


def _placed(parameter: nn.Parameter) -> Placed | None:
    """Return where a parameter's shards are; None for a plain one."""
    placements = getattr(parameter, "placements", None)
    return None if placements is None else (parameter.device_mesh, placements)  # type: ignore[attr-defined]
