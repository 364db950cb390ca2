"""The loss of a script that does not observe it: the tensor that `backward` was called on."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

_running: Tensor | None = None
"""Loss of the backward pass that is running."""
_scaled: tuple[weakref.ref[Tensor], Tensor] | None = None
"""Newest result of `GradScaler.scale`, and the loss that it is the scaled one of."""
_following = False


class SummedLoss:
    """Sums the losses of the backward passes of one step: the step applies the gradient of that sum."""

    def __init__(self) -> None:
        self._step: object = None
        self._sum: Tensor | None = None
        self.number: int | None = None
        """Number of the step; None if steps are counted."""

    def __call__(self, step: object) -> tuple[Tensor | None, int | None]:
        """Return the sum with the loss of the pass that is running, None if unknown, and the number.

        step: equal for all passes of one step.
        """
        loss = _running
        if loss is None:
            return None, self.number
        self._sum = loss if self._sum is None or step != self._step else self._sum + loss
        self._step = step
        return self._sum, self.number


def follow() -> None:
    """Note each loss from now on, once for the process: `Tensor.backward` calls `torch.autograd.backward`."""
    global _following
    if _following:
        return
    _following = True
    backward, scale = torch.autograd.backward, torch.amp.GradScaler.scale

    @functools.wraps(backward)
    def backward_with_loss(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        global _running
        # A pass within a pass is a part of it: checkpointing computes activations again.
        if _running is not None or torch.compiler.is_compiling():
            backward(tensors, grad_tensors, *args, **kwargs)
            return
        try:
            _running = None if grad_tensors is not None else _loss_of(tensors)
        except Exception:
            # What is no scalar, torch refuses in its own words.
            _running = None
        try:
            backward(tensors, grad_tensors, *args, **kwargs)
        finally:
            _running = None

    @functools.wraps(scale)
    def scale_and_remember(scaler: Any, outputs: Any) -> Any:
        global _scaled
        result = scale(scaler, outputs)
        if isinstance(outputs, Tensor) and not torch.compiler.is_compiling():
            _scaled = weakref.ref(result), outputs.detach()
        return result

    torch.autograd.backward = backward_with_loss
    vars_of_scaler: Any = torch.amp.GradScaler
    vars_of_scaler.scale = scale_and_remember


def _loss_of(tensors: Any) -> Tensor | None:
    """Return the sum of what a backward pass starts from, unscaled: its gradients are those of the sum."""
    losses = list(map(_unscaled, (tensors,) if isinstance(tensors, Tensor) else tensors))
    return sum(losses[1:], start=losses[0]) if losses else None


def _unscaled(tensor: Tensor) -> Tensor:
    loss = _scaled[1] if _scaled is not None and _scaled[0]() is tensor else tensor.detach()
    return loss.reshape(())
