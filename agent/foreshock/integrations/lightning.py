"""Watches a training of Lightning's `Trainer`.

trainer = Trainer(callbacks=[ForeshockCallback()], ...)
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    # The same trainer, from the package with its older name.
    from pytorch_lightning import Callback

from foreshock._control.clip import Clip
from foreshock._log import rank_zero_info_once
from foreshock.integrations.trainer_watch import TrainerWatch


class ForeshockCallback(Callback):  # type: ignore[misc]
    """Attaches on every rank when a training begins, and detaches when it ends.

    Losses are what the trainer calls `backward` on, and steps have its numbers. Norms are from before any clipping.
    The history that `AdaptiveClip` and `skip` decide by is part of the trainer's checkpoints.
    """

    def __init__(
        self,
        *,
        clip: float | Clip | None = None,
        skip: bool | None = None,
        dry_run: bool | None = None,
        collector: str | None = None,
        experiment: str | None = None,
        run: str | None = None,
        local_norms: bool | None = None,
    ) -> None:
        """Take the arguments of `foreshock.attach`, which checks them as a training begins.

        clip: in place of the trainer's `gradient_clip_val`; None leaves clipping to the trainer.
        """
        self._watch = TrainerWatch(
            clip=clip,
            skip=skip,
            dry_run=dry_run,
            collector=collector,
            experiment=experiment,
            run=run,
            local_norms=local_norms,
        )
        self._taken_over = False
        """Whether the trainer's `gradient_clip_val` is replaced by None."""
        self._clip_val: float | None = None

    def on_train_start(self, trainer: Any, _: Any) -> None:
        """Attach to the model that the trainer has wrapped, and to its first optimizer."""
        if len(trainer.optimizers) > 1:
            line = f"watching the first of {len(trainer.optimizers)} optimizers; for others, call foreshock.attach"
            rank_zero_info_once("trainer's optimizers", line)
        if trainer.optimizers:
            self._watch.begin(trainer.optimizers[0], trainer.gradient_clip_val)
        if self._watch.clips:
            self._clip_val, self._taken_over = trainer.gradient_clip_val, True
            trainer.gradient_clip_val = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Number the next step. Let the trainer clip again if nothing watches any more."""
        self._watch.next_step(trainer.global_step)
        if not self._watch.clips:
            self._restore(trainer)

    def on_train_end(self, trainer: Any, _: Any) -> None:
        """Detach, and leave the trainer's arguments as they were."""
        self._end(trainer, None)

    def on_exception(self, trainer: Any, _: Any, exception: BaseException) -> None:
        """Detach, and report the exception that ended the training."""
        self._end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the history of norms, for the checkpoint."""
        return self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the checkpoint."""
        self._watch.load_state_dict(state_dict)

    def _end(self, trainer: Any, error: BaseException | None) -> None:
        self._restore(trainer)
        self._watch.end(error)

    def _restore(self, trainer: Any) -> None:
        if self._taken_over:
            trainer.gradient_clip_val, self._taken_over = self._clip_val, False
