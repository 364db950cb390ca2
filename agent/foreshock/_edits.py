"""What a script does to the gradients between the end of backward and the step, noticed without a sync."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class GradientEdits:
    """A script's own clipping shows in the version counters of the gradients; `GradScaler.unscale_` leaves them alone.

    The first and the last parameter tell of all: clipping is of all of them, or of the front or the back of a model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, views: bool = False) -> None:
        """views: gradients are views of DDP's buckets, so that each changes the version of its neighbors too."""
        self._views = views
        self._ends = (parameters[0], parameters[-1])
        self._versions: tuple[int, ...] | None = None

    def backward_ended(self) -> None:
        """Remember what they look like."""
        self._versions = self._now()

    def before_step(self) -> bool | None:
        """Whether the script has edited them; None: no backward pass to compare with."""
        versions, self._versions = self._versions, None
        return None if versions is None else versions != self._now()

    def dropped(self, arrived: Tensor) -> bool:
        """In a new backward pass: the gradients of the last one, which `backward_ended` saw, are not there any more.

        arrived: a parameter that has its new gradient already; it tells nothing. Unknown is no.
        """
        if self._versions is None:
            return False
        for parameter, version in zip(self._ends, self._versions, strict=True):
            if parameter is not arrived and version >= 0:
                return parameter.grad is None or (not self._views and parameter.grad._version != version)
        return False

    def _now(self) -> tuple[int, ...]:
        return tuple(-1 if p.grad is None else p.grad._version for p in self._ends)
