"""Finds the model that an optimizer trains: nothing leads from a parameter to its modules but the garbage collector."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foreshock._arithmetic.parameters import trainable
from foreshock._attach.models import is_sharded, trains_alone


def model_of(optimizer: torch.optim.Optimizer) -> nn.Module | None:
    """Return the DDP or sharded model with the optimizer's parameters; in a process that trains alone, its module.

    None if there is no such model. Walks through all objects of the process, so it is for the first step only.
    """
    wanted = set(trainable(optimizer))
    if not wanted:
        return None
    around = _modules_around(next(iter(wanted)))
    ddp = [module for module in around if isinstance(module, DistributedDataParallel)]
    sharded = [module for module in around if is_sharded(module)]
    if ddp or sharded:
        return ddp[0] if ddp else sharded[-1]
    if trains_alone():
        return next((module for module in around if wanted <= set(module.parameters())), None)
    return None


def _modules_around(parameter: nn.Parameter) -> list[nn.Module]:
    """Return the modules that contain a parameter, from the innermost outward."""
    modules = _all_modules()
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module.children():
            parents.setdefault(id(child), []).append(module)
    around = [module for module in modules if any(own is parameter for own in module.parameters(recurse=False))]
    reached = set(map(id, around))
    for module in around:
        new = [parent for parent in parents.get(id(module), ()) if id(parent) not in reached]
        reached.update(map(id, new))
        around += new
    return around


def _all_modules() -> list[nn.Module]:
    # By type, each asked once: `isinstance` would run the code of proxies and lazy objects.
    is_module: dict[type, bool] = {}
    found = []
    for each in gc.get_objects():
        kind = type(each)
        known = is_module.get(kind)
        if known is None:
            known = is_module[kind] = nn.Module in kind.__mro__
        if known and "_modules" in vars(each):
            found.append(each)
    return found
