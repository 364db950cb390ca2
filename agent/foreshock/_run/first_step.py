"""The first step of each optimizer under `foreshock run`: does what `attach` would, without a call in the script."""

from __future__ import annotations

from weakref import WeakSet

import torch
import torch.distributed as dist

from foreshock._attach.attach import attach_without_script, called_by_script
from foreshock._errors import ForeshockError
from foreshock._log import rank_zero_info_once, rank_zero_warn_once, set_rank
from foreshock._output.leaving import is_watched
from foreshock._run import pass_loss
from foreshock._run.model_search import model_of
from foreshock._watch import ActiveWatch

_seen: WeakSet[torch.optim.Optimizer] = WeakSet()
"""Optimizers that have made a step."""


def before_step(optimizer: torch.optim.Optimizer) -> None:
    """Watch the optimizer and the model whose parameters it holds, if this is its first step.

    All ranks take this step, and so attach together. Never raises into training.
    """
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    kind = type(optimizer).__name__
    try:
        _watch(optimizer, kind)
    except ForeshockError as error:
        rank_zero_warn_once(f"first step of {kind}", f"not watching {kind}: {error}")
    except Exception as error:
        line = f"not watching {kind}: {type(error).__name__}: {error}"
        rank_zero_warn_once(f"first step of {kind}", line)


def _watch(optimizer: torch.optim.Optimizer, kind: str) -> None:
    if called_by_script() or is_watched(optimizer):
        return
    if dist.is_available() and dist.is_initialized():
        set_rank(dist.get_rank())
    model = model_of(optimizer)
    if model is None:
        why = "no DDP or sharded model, nor that of a process that trains alone, holds its parameters"
        rank_zero_info_once(f"first step of {kind}", f"not watching {kind}: {why}")
        return
    watch = attach_without_script(model, optimizer)
    if isinstance(watch, ActiveWatch):
        pass_loss.follow()
        watch.observed_of_pass, watch.missed_passes = pass_loss.SummedLoss(), 1
