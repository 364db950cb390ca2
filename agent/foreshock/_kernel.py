"""What the optimizer's own kernel is asked to do on one step: divide the gradient, or leave the parameters alone.

Fused Adam, AdamW, SGD and Adagrad take `grad_scale`, a float32 divisor, and `found_inf`, which must be exactly 1.0 to
leave a step out (2.0 would run it, and drive Adam's count negative). GradScaler speaks to them in the same way, and
before us; what it said is composed with, and put back.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from foreshock._clip import Clip
from foreshock._log import rank_zero_warn_once
from foreshock._numbers import Flag, Number, number, ratio
from foreshock._policies import Ruling
from foreshock._summary import trainable


class Kernel:
    """Of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip: Clip | None, parameters: Collection[Tensor]) -> None:
        """parameters: that are clipped. The kernel divides all gradients of its optimizer, or none."""
        self._optimizer = optimizer
        self._clip = clip
        self.clips(parameters)
        # As the kernels take them.
        one = torch.ones((), dtype=torch.float32, device=next(iter(parameters)).device)
        self._divisor, self._skip = one, one.clone()
        self._lent: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def clips(self, parameters: Collection[Tensor]) -> None:
        """These parameters, from now on."""
        self._all_clipped = set(trainable(self._optimizer)) <= set(parameters)

    @property
    def _fused(self) -> bool:
        # Asked anew each step: a checkpoint brings the `fused` of its own optimizer along.
        return clips_in_kernel(self._optimizer) and self._all_clipped

    @property
    def scale(self) -> Number | None:
        """GradScaler's, which the gradients still carry; None without one, or where they are unscaled already."""
        return self._told("grad_scale")

    @property
    def found_inf(self) -> Number | None:
        """Not zero where the step is to be left out."""
        return self._told("found_inf")

    def follow(self, ruling: Ruling, gradients: list[Tensor], scale: Number | None) -> Number | None:
        """Do as ruled; the clip coefficient, or None where the gradient is not scaled."""
        divisor = ruling.divisor
        if divisor is not None and not isinstance(divisor, Tensor) and divisor == 1.0:
            divisor = None
        coefficient = None if divisor is None else 1.0 / divisor
        # Whatever may fail comes before this: gradients are touched last, once.
        if ruling.skip is not None:
            self._leave_out(ruling.skip)
        if self._clip is not None:
            self._bend(self._clip, gradients, scale)
        if divisor is not None and coefficient is not None:
            if self._fused:
                self._lend("grad_scale", _set(self._divisor, divisor if scale is None else divisor * scale))
            else:
                torch._foreach_mul_(gradients, coefficient)
        return coefficient

    def follow_plainly(self, ruling: Ruling, gradients: list[Tensor], scale: Number | None) -> None:
        """The same by other means, to rounding: where `follow` has failed on this rank."""
        self.take_back()
        if ruling.skip is not None:
            self._leave_out(ruling.skip)
        if self._clip is not None:
            self._bend(self._clip, gradients, scale)
        if ruling.divisor is not None:
            for gradient in gradients:
                gradient.mul_(1.0 / ruling.divisor)

    def take_back(self) -> None:
        """Put the optimizer back as it was, also after a step that raised: the divisor would be taken for a scale.

        Put back and not deleted: GradScaler deletes what it set there itself.
        """
        lent, self._lent = self._lent, {}
        for name, (ours, theirs) in lent.items():
            if getattr(self._optimizer, name, None) is ours:
                setattr(self._optimizer, name, theirs)

    def _leave_out(self, skip: Flag) -> None:
        if not clips_in_kernel(self._optimizer):
            rank_zero_warn_once("not fused", f"steps can no longer be skipped: {why_not_skipped(self._optimizer)}")
            return
        self._guard_momentum()
        if skip is False:
            return
        theirs = self.found_inf
        self._lend("found_inf", _set(self._skip, skip if theirs is None else skip | (theirs > 0)))

    def _bend(self, clip: Clip, gradients: list[Tensor], scale: Number | None) -> None:
        if scale is not None and clip.bends_elements:
            # GradScaler leaves it to the kernel to unscale: elements have to be unscaled before they are compared.
            torch._foreach_mul_(gradients, ratio(1.0, scale))
            self._lend("grad_scale", None)
        clip.bend(gradients)

    def _told(self, name: str) -> Number | None:
        value = getattr(self._optimizer, name, None)
        return None if value is None else number(value)

    def _lend(self, name: str, value: Tensor | None) -> None:
        self._lent[name] = (value, getattr(self._optimizer, name, None))
        setattr(self._optimizer, name, value)

    def _guard_momentum(self) -> None:
        """Fused SGD makes its momentum on its first step, and leaves it uninitialised where that is left out.

        Zeros, made before, come to the same without dampening; with it, attach refuses to leave steps out.
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


def _set(tensor: Tensor, value: Number | Flag) -> Tensor:
    return tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)


def why_not_skipped(optimizer: torch.optim.Optimizer) -> str:
    """Why a step of this optimizer cannot be left out on the device; empty if it can."""
    kind = type(optimizer).__name__
    if not clips_in_kernel(optimizer):
        return (
            f"{kind} is not fused, so skipping a step would require reading from the device; "
            "use Adam, AdamW, SGD or Adagrad with fused=True"
        )
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        return f"{kind} with dampening must not skip its first step; use dampening=0"
    return ""


def clips_in_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """The optimizer's kernel divides by `grad_scale` itself: fused Adam, AdamW, SGD and Adagrad."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and all(group.get("fused") for group in optimizer.param_groups)
