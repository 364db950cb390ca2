"""Makes the optimizer divide the gradients or leave out a step, in its own kernel.

Fused Adam, AdamW, SGD and Adagrad take `grad_scale`, a float32 divisor, and `found_inf`, which must be exactly 1.0 to
skip a step (2.0 would run it, and make Adam's step count negative). `GradScaler` sets both before us; its values are
combined with ours, and restored after the step.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Collection
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from types import FrameType

import torch
from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number
from foreshock._arithmetic.parameters import trainable
from foreshock._log import rank_zero_warn_once
from foreshock._step import Step
from foreshock._torch import scale_of, supports_division

is_fused = methodcaller("get", "fused")
_SCALER_STEP = torch.amp.GradScaler.step.__code__
_CALLERS = 24
"""Frames searched for a scaler: between its call and ours lie hooks, schedulers and what frameworks add."""


class OptimizerControl:
    """Overrides `grad_scale` and `found_inf` of one optimizer for one step."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, arithmetic: Arithmetic, parameters: Collection[Tensor]
    ) -> None:
        """parameters: to be clipped. The optimizer divides all of its gradients, or none."""
        self._optimizer = optimizer
        self._arithmetic = arithmetic
        self._supports_division = supports_division(optimizer)
        self._held: list[int] = []
        self.is_changed()
        self.scaler: weakref.ref[torch.amp.GradScaler] | None = None
        """The `GradScaler` that made the newest step; None if none did."""
        self.newest_scale: Number | None = None
        """Loss scale of the newest backward pass; None without a scaler, or before its first step."""
        self.clip_only(parameters)
        # float32, as the optimizers take them.
        one = torch.ones((), dtype=torch.float32, device=next(iter(parameters)).device)
        self._divisor, self._skip = one, one.clone()
        self.overridden: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        """Value of ours and value before it, by attribute, during a step."""

    def clip_only(self, parameters: Collection[Tensor]) -> None:
        """Clip these parameters from now on."""
        self._all_clipped = set(trainable(self._optimizer)) <= set(parameters)

    def read(self, step: Step) -> None:
        """Fill in what a `GradScaler` has set: its own skip, and the scale of the loss."""
        if self.overridden:
            # The step before has raised.
            self.restore()
        scale, found_inf = getattr(self._optimizer, "grad_scale", None), getattr(self._optimizer, "found_inf", None)
        step.grad_scale = None if scale is None else self._arithmetic.number(scale)
        step.found_inf = None if found_inf is None else self._arithmetic.number(found_inf)
        step.loss_scale = step.grad_scale
        if scale is None:
            # The script has unscaled the gradients, or no scaler makes this step.
            self._find_scaler()
            step.loss_scale = None if self.scaler is None else self._scale_of_scaler()

    def backward_ended(self) -> None:
        """Remember the loss scale of this pass: the scaler changes it afterwards."""
        self.newest_scale = self._scale_of_scaler()

    def is_changed(self) -> bool:
        """Return whether the optimizer holds other parameters than when this was last asked."""
        parameters = list(chain.from_iterable(map(itemgetter("params"), self._optimizer.param_groups)))
        held = [*map(id, parameters), *map(attrgetter("requires_grad"), parameters)]
        before, self._held = self._held, held
        return held != before

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group; NaN if the host does not know it without waiting."""
        rate = self._optimizer.param_groups[0]["lr"]
        return math.nan if getattr(rate, "is_cpu", True) is False else float(rate)

    def can_divide(self) -> bool:
        """Return whether the optimizer's kernel can divide just the gradients to be clipped.

        Asked at each step: a loaded checkpoint brings the `fused` of its own optimizer.
        """
        return self._all_clipped and self._supports_division and all(map(is_fused, self._optimizer.param_groups))

    def divide(self, divisor: Number) -> bool:
        """Divide the gradients in the optimizer's kernel; return False if it cannot."""
        if not self.can_divide():
            return False
        self.override("grad_scale", self._divisor.fill_(divisor))
        return True

    def keep_undivided(self) -> None:
        """Keep the optimizer from unscaling: the gradients are unscaled already."""
        self.override("grad_scale", None)

    def can_skip(self) -> bool:
        """Return whether the optimizer can skip a step, and warn once if it no longer can."""
        if divides_gradients(self._optimizer):
            return True
        rank_zero_warn_once("not fused", f"steps can no longer be skipped: {why_not_skipped(self._optimizer)}")
        return False

    def skip(self, step: Step, skip: Flag) -> None:
        """Skip the step where the flag is true."""
        if not self.can_skip():
            return
        self.guard_momentum()
        if skip is False:
            return
        theirs = step.found_inf
        value = self._skip.fill_(skip if theirs is None else skip | (theirs > 0))
        self.override("found_inf", value)
        step.found_inf = self._arithmetic.number(value)

    def restore(self) -> None:
        """Restore the optimizer's own values, also after a step that raised: a divisor would be taken for a scale.

        They are set again and not deleted: `GradScaler` itself deletes what it has set.
        """
        overridden, self.overridden = self.overridden, {}
        for name, (ours, theirs) in overridden.items():
            if getattr(self._optimizer, name, None) is ours:
                setattr(self._optimizer, name, theirs)

    def override(self, name: str, value: Tensor | None) -> None:
        """Set `grad_scale` or `found_inf` for one step. value: float32, no dimensions, or None."""
        self.overridden[name] = (value, getattr(self._optimizer, name, None))
        setattr(self._optimizer, name, value)

    def _find_scaler(self) -> None:
        # The scaler leaves its scale with the optimizer only where a fused kernel is still to divide by it. Elsewhere
        # only the scaler knows it, and nothing leads from an optimizer to its scaler but the call itself.
        self.scaler = None
        frame: FrameType | None = sys._getframe(1)
        for _ in range(_CALLERS):
            if frame is None:
                break
            if frame.f_code is _SCALER_STEP:
                self.scaler = weakref.ref(frame.f_locals["self"])
                break
            frame = frame.f_back

    def _scale_of_scaler(self) -> Number | None:
        scaler = None if self.scaler is None else self.scaler()
        scale = None if scaler is None else scale_of(scaler)
        return None if scale is None else self._arithmetic.number(scale)

    def guard_momentum(self) -> None:
        """Create the momentum of a fused SGD, which leaves it uninitialized if its first step is skipped.

        Zeros give the same first step without dampening; with dampening, attach refuses to skip.
        """
        if not isinstance(self._optimizer, torch.optim.SGD):
            return
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            present = (p for p in group["params"] if p.grad is not None)
            first = next(present, None) if group["momentum"] else None
            if first is not None and state[first].get("momentum_buffer") is None:
                for parameter in (first, *present):
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)


def divides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's own kernel can divide the gradients: fused Adam, AdamW, SGD and Adagrad."""
    return supports_division(optimizer) and all(map(is_fused, optimizer.param_groups))


def why_not_skipped(optimizer: torch.optim.Optimizer) -> str:
    """Return why a step of this optimizer cannot be skipped on the device; empty if it can."""
    kind = type(optimizer).__name__
    if not divides_gradients(optimizer):
        return (
            f"{kind} is not fused, so skipping a step would require reading from the device; "
            "use Adam, AdamW, SGD or Adagrad with fused=True"
        )
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        return f"{kind} with dampening must not skip its first step; use dampening=0"
    return ""
