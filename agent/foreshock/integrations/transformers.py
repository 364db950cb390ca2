"""Watches a training of Hugging Face's `transformers.Trainer`.

trainer = Trainer(model, arguments, callbacks=[ForeshockCallback()], ...)
"""

from __future__ import annotations

import math
from typing import Any

import transformers

from foreshock._control.clip import Clip
from foreshock.integrations.trainer_watch import TrainerWatch


class ForeshockCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Attaches on every rank when a training begins, and detaches when it ends.

    Losses are what the trainer calls `backward` on, and steps have its numbers. Norms are from before any clipping.
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

        clip: in place of the trainer's `max_grad_norm`; None leaves clipping to the trainer.
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
        self._arguments: Any = None
        """The trainer's, while its `max_grad_norm` is replaced."""
        self._max_norm: float | None = None

    def on_train_begin(self, args: Any, *_: Any, optimizer: Any, **__: Any) -> None:
        """Attach to the model that the trainer has wrapped, and to its optimizer."""
        # A training that raised has not called `on_train_end`.
        self._end()
        self._watch.begin(optimizer, args.max_grad_norm)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Number the next step; keep the trainer from clipping it."""
        self._watch.next_step(state.global_step)
        if self._watch.clips:
            self._arguments, self._max_norm = args, args.max_grad_norm
            # With 0, older trainers would no longer log the norm.
            args.max_grad_norm = math.inf

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Restore the trainer's arguments, which checkpoints contain."""
        self._restore()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Detach."""
        self._end()

    def _end(self) -> None:
        self._restore()
        self._watch.end()

    def _restore(self) -> None:
        if self._arguments is not None:
            self._arguments.max_grad_norm, self._arguments = self._max_norm, None
