"""Watches a training of Hugging Face's `transformers.Trainer`.

trainer = Trainer(model, arguments, callbacks=[ForeshockCallback()], ...)
"""

from __future__ import annotations

from typing import Any

import transformers

from foreshock._attach.attach import attach
from foreshock._attach.models import inner_optimizer
from foreshock._handle import Watch
from foreshock._log import rank_zero_info_once
from foreshock._run import pass_loss
from foreshock._run.model_search import model_of
from foreshock._watch import ActiveWatch


class ForeshockCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Attaches on every rank when a training begins, and detaches when it ends.

    Losses are what the trainer calls `backward` on, and steps have its numbers. The trainer goes on to clip by its
    own `max_grad_norm`; norms are from before that.
    """

    def __init__(
        self,
        *,
        collector: str | None = None,
        experiment: str | None = None,
        run: str | None = None,
        local_norms: bool | None = None,
    ) -> None:
        """collector, experiment, run, local_norms: as in `foreshock.attach`, which checks them as a training begins."""
        self._settings: dict[str, Any] = {
            "collector": collector,
            "experiment": experiment,
            "run": run,
            "local_norms": local_norms,
        }
        self._watch: Watch | None = None
        self._loss = pass_loss.SummedLoss()

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Attach to the model that the trainer has wrapped, and to its optimizer."""
        inner = inner_optimizer(optimizer)
        model = model_of(inner)
        if model is None:
            why = f"no DDP or sharded model holds the parameters of {type(inner).__name__}"
            rank_zero_info_once("trainer's model", f"not watching: {why}")
            return
        self._watch = attach(model, inner, **self._settings)
        if isinstance(self._watch, ActiveWatch):
            pass_loss.follow()
            self._watch.observed_of_pass = self._loss

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Give the next record the trainer's number, also after it has resumed from a checkpoint."""
        self._loss.number = state.global_step

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Detach."""
        if self._watch is not None:
            self._watch.detach()
