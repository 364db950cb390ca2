"""What a script does to the gradients between the end of backward and the step, noticed without a sync."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class GradientEdits:
    """A script's own clipping shows in the version counters of the gradients; `GradScaler.unscale_` leaves them alone.

    The first and the last parameter tell of all: clipping is of all of them, or of the front or the back of a model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._ends = (parameters[0], parameters[-1])
        self._versions: tuple[int, ...] | None = None
        self.seen = False
        """The script edits gradients: it has been seen to."""

    def backward_ended(self) -> None:
        """Remember what they look like."""
        self._versions = self._now()

    def before_step(self) -> bool:
        """Whether the script has edited them."""
        versions, self._versions = self._versions, None
        if versions is None:
            # No backward pass to compare with: what the script is known for.
            return self.seen
        edited = versions != self._now()
        self.seen = self.seen or edited
        return edited

    def _now(self) -> tuple[int, ...]:
        return tuple(-1 if p.grad is None else p.grad._version for p in self._ends)
