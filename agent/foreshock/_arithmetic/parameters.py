"""Parameters, layers and module types of a model, as the collector needs them to name a culprit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foreshock._torch import original_type

MAX_LAYERS = 256
"""Layer norms travel every step; a model of more module groups has neighbors merged."""


class ParameterLayout:
    """Maps each of several norms to its parameter and its layer."""

    def __init__(
        self,
        parameters: tuple[int, ...],
        layer_of: Sequence[int],
        layers: int,
        device: torch.device,
        numbers: Sequence[int],
    ) -> None:
        """parameters: index of each norm's parameter. layer_of: layer of each index, of `layers` in all. device: of the
        gradients. numbers: the collector's number of each index.
        """
        self.parameters = parameters
        self.layer_of = [layer_of[i] for i in parameters]
        self.layers = layers
        self.numbers = [numbers[i] for i in parameters]
        self.numbers_on_device = torch.tensor(self.numbers, dtype=torch.int64, device=device)
        self.layer_of_on_device = torch.tensor(self.layer_of, dtype=torch.int64, device=device)


@dataclass(frozen=True, kw_only=True)
class ParameterPlan:
    """Lists the trainable parameters that DDP averages and the optimizer holds, in the model's order, by layer."""

    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    layers: tuple[str, ...]
    layer_of: tuple[int, ...]
    """Index into layers, one per parameter."""
    index: dict[Tensor, int] = field(repr=False)
    """Position by identity: DDP reorders its buckets after the first step, so nothing else is stable."""
    numbers: tuple[int, ...]
    """The collector's number of each parameter: its position in the model summary that attach sends."""

    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.parameters[0].device

    def layout(self, parameters: tuple[int, ...]) -> ParameterLayout:
        """Return the layout of norms of the parameters at these positions, in this order."""
        return ParameterLayout(parameters, self.layer_of, len(self.layers), self.device(), self.numbers)


def trainable(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all parameters that the optimizer may change."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def averaged_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters whose gradients DDP averages, by name; of a model without DDP, all."""
    if not isinstance(model, DistributedDataParallel):
        return list(model.named_parameters())
    ignored = model.parameters_to_ignore
    return [(name, parameter) for name, parameter in model.module.named_parameters() if name not in ignored]


def plan_parameters(model: nn.Module, optimizer: torch.optim.Optimizer, ignored: Collection[str] = ()) -> ParameterPlan:
    """Return the plan of what is measured; shared parameters count once.

    ignored: names of parameters that DDP does not average. Ranks differ in their gradients: a norm with them in it
    would be another one on each rank, and so would be what is clipped.
    """
    wanted = set(trainable(optimizer))
    named = [(name, p) for name, p in model.named_parameters() if p in wanted and name not in ignored]
    names = tuple(name for name, _ in named)
    layers, layer_of = group_layers(names)
    return _plan(named, layers, layer_of, tuple(range(len(named))))


def updated_plan(
    plan: ParameterPlan, averaged: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> ParameterPlan:
    """Return the plan of the parameters that the optimizer holds by now.

    plan: made earlier. averaged: parameters whose gradients are averaged, by name, in the model's order.

    Layers stay as they were sent. A new parameter belongs to the layer with the most similar name, and has a number for
    which the collector has no name.
    """
    wanted = set(trainable(optimizer))
    named = [(name, p) for name, p in averaged if p in wanted]
    new = [name for name, p in named if p not in plan.index]
    unnamed = max(plan.numbers) + 1
    layer_of = [plan.layer_of[plan.index[p]] if p in plan.index else _nearest(name, plan.layers) for name, p in named]
    numbers = [plan.numbers[plan.index[p]] if p in plan.index else unnamed + new.index(name) for name, p in named]
    return _plan(named, plan.layers, tuple(layer_of), tuple(numbers))


def _plan(
    named: Sequence[tuple[str, nn.Parameter]],
    layers: tuple[str, ...],
    layer_of: tuple[int, ...],
    numbers: tuple[int, ...],
) -> ParameterPlan:
    parameters = tuple(p for _, p in named)
    return ParameterPlan(
        parameters=parameters,
        names=tuple(name for name, _ in named),
        layers=layers,
        layer_of=layer_of,
        index={p: i for i, p in enumerate(parameters)},
        numbers=numbers,
    )


def _nearest(name: str, layers: Sequence[str]) -> int:
    """Return the layer that shares most of the path; of several, the last."""

    def shared(layer: str) -> int:
        alike = [mine == theirs for mine, theirs in zip(name.split("."), layer.split("."), strict=False)]
        return [*alike, False].index(False)

    return max(range(len(layers)), key=lambda layer: (shared(layers[layer]), layer))


def group_layers(names: Sequence[str], limit: int = MAX_LAYERS) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Group parameter names by module, then by ever shorter paths until `limit` groups are enough.

    Deterministic, and in order of first appearance. If even the first parts of the names are too many, neighbors
    are merged in equal runs and named after their first.
    """
    paths = [name.split(".")[:-1] or [name] for name in names]
    depth = max((len(path) for path in paths), default=1)
    while True:
        groups = [".".join(path[:depth]) for path in paths]
        layers = list(dict.fromkeys(groups))
        if len(layers) <= limit or depth == 1:
            break
        depth -= 1
    position = {layer: i for i, layer in enumerate(layers)}
    run = -(-len(layers) // limit) if layers else 1
    return tuple(layers[::run]), tuple(position[group] // run for group in groups)


def model_summary(model: nn.Module, plan: ParameterPlan) -> dict[str, Any]:
    """`ModelSummary` of the wire contract, as JSON."""
    return {
        "type": original_type(model).__name__,
        "module_types": dict(Counter(original_type(m).__name__ for m in model.modules() if m is not model)),
        "parameters": list(plan.names),
        "parameter_sizes": [p.numel() for p in plan.parameters],
        "layers": list(plan.layers),
        "parameter_layers": list(plan.layer_of),
    }
