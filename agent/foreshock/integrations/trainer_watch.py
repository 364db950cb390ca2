"""A watch for as long as a trainer trains: what the callbacks for trainers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from foreshock._attach.attach import attach
from foreshock._attach.models import inner_optimizer
from foreshock._attach.settings import settings_from
from foreshock._handle import Watch
from foreshock._log import rank_zero_info_once, set_rank
from foreshock._run import pass_loss
from foreshock._run.model_search import model_of
from foreshock._watch import ActiveWatch


class TrainerWatch:
    """Watches the model that a trainer has wrapped. Losses are what the trainer calls `backward` on."""

    def __init__(self, **settings: Any) -> None:
        """settings: arguments of `foreshock.attach`, which checks them as a training begins."""
        self._settings = settings
        self._loss = pass_loss.SummedLoss()
        self._history: Mapping[str, Any] = {}
        self._clips = False
        self.watch = Watch()
        """Watch of the newest training; one that does nothing before the first."""

    @property
    def clips(self) -> bool:
        """Whether Foreshock clips, so that the trainer must not: not before `begin`, nor once the watch has ended."""
        return self._clips and self.watch.enabled

    def begin(self, optimizer: Any, max_norm: float | None) -> None:
        """Attach.

        optimizer: the trainer's, on which it calls `step`; None if it has not told. max_norm: by which the trainer
        clips; None or 0 if it does not. Raises what `foreshock.attach` raises.
        """
        if optimizer is None:
            line = "not watching: this version of the trainer hands callbacks no optimizer; call foreshock.attach"
            rank_zero_info_once("trainer's optimizer", line)
            return
        if dist.is_available() and dist.is_initialized():
            set_rank(dist.get_rank())
        inner = inner_optimizer(optimizer)
        model = model_of(inner)
        if model is None:
            why = f"no DDP or sharded model holds the parameters of {type(inner).__name__}"
            rank_zero_info_once("trainer's model", f"not watching: {why}")
            return
        self.watch = attach(model, inner, **self._settings)
        if not isinstance(self.watch, ActiveWatch):
            return
        pass_loss.follow()
        self.watch.observed_of_pass = self._loss
        history, self._history = self._history, {}
        self.watch.load_state_dict(history)
        settings = settings_from(**self._settings)
        self._clips = settings.clip is not None and not settings.dry_run
        trainer_clips = bool(max_norm) and max_norm != math.inf
        if self._clips or not trainer_clips:
            # To log the norm, trainers multiply gradients by 1.
            self.watch.expect_no_clipping()
        if self._clips and trainer_clips:
            line = f"clipping by {settings.clip}, and no longer by the trainer's own {max_norm:g}"
            rank_zero_info_once("trainer's clipping", line)

    def next_step(self, number: int) -> None:
        """Give the next record the trainer's number, also after it has resumed from a checkpoint."""
        self._loss.number = number

    def state_dict(self) -> dict[str, Any]:
        """Return `Watch.state_dict`, for the trainer's checkpoint."""
        return dict(self.watch.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from it in the next training."""
        self._history = dict(state_dict)

    def end(self, error: BaseException | None = None) -> None:
        """Detach. error: the exception that ended the training, if any."""
        self.watch.__exit__(None if error is None else type(error), error, None)
