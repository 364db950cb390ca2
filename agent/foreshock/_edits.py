"""What happens to the gradients between the end of backward and the step, noticed without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-6
"""Of a quotient of two float32 norms; a power of two is exact but where gradients are subnormal."""


class GradientEdits:
    """A script's own clipping shows in the version counters of the gradients. `GradScaler.unscale_` does not.

    It leaves the counters alone and divides every gradient by the scale, a power of two unless somebody chose
    otherwise: the norm of the smallest parameter tells it, before and after.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._ends = (parameters[0], parameters[-1])
        self._smallest = min(parameters, key=Tensor.numel)
        self._versions: tuple[int, ...] | None = None
        self._norm: Tensor | None = None
        self.scale: Tensor | None = None
        """Newest known: what the loss was multiplied by, where the gradients have been divided by it since. float64."""
        self.seen = False
        """The script edits gradients: it has been seen to."""

    def backward_ended(self) -> None:
        """Remember what they look like."""
        self._versions, self._norm = self._now(), self._norm_now()

    def before_step(self) -> bool:
        """Whether the script has edited them; if not, `scale` is up to date."""
        versions, norm = self._versions, self._norm
        self._versions = self._norm = None
        if versions is None:
            # No backward pass to compare with: what the script is known for.
            return self.seen
        if versions != self._now():
            self.seen = True
            return True
        after = self._norm_now()
        if norm is not None and after is not None:
            self.scale = self._quotient(norm, after)
        return False

    def _quotient(self, before: Tensor, after: Tensor) -> Tensor | None:
        if before.is_cpu and float(before) == float(after):
            # The usual case, and there a comparison is free.
            return None
        ratio = before / after
        power = ratio.log2().round().exp2()
        known = torch.ones_like(power) if self.scale is None else self.scale
        return torch.where((ratio / power - 1).abs() < _TOLERANCE, power, known)

    def _now(self) -> tuple[int, ...]:
        return tuple(-1 if p.grad is None else p.grad._version for p in self._ends)

    def _norm_now(self) -> Tensor | None:
        gradient = self._smallest.grad
        return None if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float64)
