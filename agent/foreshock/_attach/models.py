"""Which models and optimizers can be watched, and what is known of one before any hook: the rest is refused."""

from __future__ import annotations

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
    """Describes a model that several ranks train."""

    root: nn.Module
    """The DDP model, or the root of a sharded one."""
    module: nn.Module
    """The script's own module, whose parameters are measured."""
    ddp: DistributedDataParallel | None
    """None for a model that is sharded by `fully_shard`."""
    group: dist.ProcessGroup
    """All ranks that train it."""
    replicas: int = 1
    """Ranks that hold the same shard; 1 for DDP."""


def group_of(model: nn.Module) -> dist.ProcessGroup:
    """Return the ranks that must agree to watch a model; for one that cannot be watched, all ranks: they must learn."""
    inner = _unwrapped(model)
    group: dist.ProcessGroup | None = getattr(inner, "process_group", None)
    if group is None and _is_sharded(inner):
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
    if _is_sharded(inner):
        watched = _checked_shards(inner)
    elif isinstance(inner, DistributedDataParallel):
        watched = WatchedModel(root=inner, module=inner.module, ddp=inner, group=inner.process_group)
    else:
        raise SettingsError(_why_neither(model, inner))
    if any(getattr(module, "sparse", False) is True for module in watched.module.modules()):
        raise SettingsError(
            "model: has an embedding with sparse gradients, whose norm is not measured; use sparse=False"
        )
    if any(parameter.is_complex() for parameter in watched.module.parameters()):
        raise SettingsError(
            "model: has complex parameters, whose gradients are not measured; store them as torch.view_as_real"
        )
    return watched


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
        kind = "sharded" if model.ddp is None else "DDP"
        raise SettingsError(
            f"optimizer: holds {len(others)} parameter(s) of another model, whose gradients this {kind} model does not "
            "average; give each model its own optimizer"
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


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = uncompiled(model)
    return inner if isinstance(inner, DistributedDataParallel) or _is_sharded(inner) else model


def _is_sharded(module: object) -> bool:
    # Imported late: it would take most of the time of `import foreshock`.
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _why_neither(model: nn.Module, inner: nn.Module) -> str:
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(inner).__mro__):
        return "model: FullyShardedDataParallel flattens parameters, so layers cannot be measured; use fully_shard"
    if isinstance(model, nn.Module) and any(map(_is_sharded, model.modules())):
        return "model: fully_shard was applied only to parts of it; apply it to the whole model too, last"
    wrap = "wrap it first: DistributedDataParallel(model)"
    return f"model: must be a DistributedDataParallel, not {type(model).__name__}; {wrap}"


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
    return WatchedModel(root=model, module=model, ddp=None, group=group, replicas=group.size() // mesh.shape[-1])


def _resharded(model: nn.Module) -> nn.Module:
    """Return a sharded model with its parameters as the optimizer holds them: after a forward pass, some are whole.

    The next forward pass gathers them again.
    """
    for module in filter(_is_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]
    return model


def _placed(parameter: nn.Parameter) -> Placed | None:
    """Return where a parameter's shards are; None for a plain one."""
    placements = getattr(parameter, "placements", None)
    return None if placements is None else (parameter.device_mesh, placements)  # type: ignore[attr-defined]
