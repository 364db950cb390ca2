"""What attach returns: what a script may do with it. This one does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor


class Watch:
    """Handle of an attached model. A context manager: leaving it detaches."""

    enabled: bool = False

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """Record this rank's loss and the script's own step number, once per optimizer step, before or after it.

        loss: a device tensor (a scalar, else its mean is taken), never read back here. step: of the optimizer, an
        integer; a resumed run passes where it resumes. Both are optional. An observation of a step that the script, or
        a GradScaler, then skips is a record of its own. So pass only training losses: a validation loss that one rank
        observes makes a record on that rank alone, and shifts its later records against the others'.
        """

    @property
    def tripped(self) -> bool:
        """With `skip`: a step that had to be left out was not, since too many had been. Time to save and stop.

        Eight steps late, and for that the same on every rank at the same step, and without waiting for the device.
        """
        return False

    def dry_run_counts(self) -> dict[str, int]:
        """With `dry_run`: "steps" so far, and how many of them would have been "clipped" and "skipped".

        Waits for the device: not for every step. Empty without `dry_run`.
        """
        return {}

    def state_dict(self) -> dict[str, float | None]:
        """Return the history of norms that `AdaptiveClip` and `skip` decide by, as plain numbers, for a checkpoint.

        The same on every rank. Waits for the device: not for every step. Empty without such a history.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the history of the checkpoint that this run resumes from, on every rank.

        Replaces a history that `attach` has got from the collector. Does nothing if the dict is empty, or no history is
        kept. The budget of `skip` starts over. Raises `SettingsError`, a `ValueError`, if `state_dict` has not returned
        this.
        """

    def detach(self) -> None:
        """Stop watching. This rank still takes part in the sums over ranks, so ranks may detach at any time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave_block(error)

    def _leave_block(self, error: BaseException | None) -> None:
        """A `with` block is over, by this exception or by itself."""


class DisabledWatch(Watch):
    """Does nothing: the kill switch is on, or a rank could not attach."""
