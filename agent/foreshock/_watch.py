"""What attach returns: watches one rank's training steps. The hooks call it; it decides nothing by waiting."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from foreshock._alone import LoneRank
from foreshock._averaged import AveragedGradient
from foreshock._clip import Clip
from foreshock._console import say_once
from foreshock._edits import GradientEdits
from foreshock._guard import Guard
from foreshock._hooks import BackwardEnd, StepHooks
from foreshock._kernel import Kernel
from foreshock._launch import RecorderProcess, announce
from foreshock._local import LocalNorms, RankSums
from foreshock._norms import NormSummary
from foreshock._numbers import Number, number
from foreshock._policies import Policies, Ruling
from foreshock._records import Records
from foreshock._rows import Row
from foreshock._scaler import scale_of_caller
from foreshock._shadow import Shadow
from foreshock._summary import ParameterPlan
from foreshock._weights import Weights, due
from foreshock_recorder.ring import EDITED, Farewell

_SETTLE_SECONDS = 0.5
"""For sums of a few numbers: only a rank that is gone takes longer."""


class Watch:
    """Handle of an attached model. A context manager: leaving it detaches."""

    enabled: bool = False

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """Tell this rank's loss and the script's own step number, once per optimizer step, before or after it.

        loss: a device tensor (scalar, or averaged), never read back here. step: of the optimizer; a resumed run says
        where it resumes. Both optional.
        """

    @property
    def tripped(self) -> bool:
        """With `skip`: a step that had to be left out was not, since too many had been. Time to save and stop.

        Eight steps late, and for that the same on every rank at the same step, and without waiting for the device.
        """
        return False

    def shadow_counts(self) -> dict[str, int]:
        """With `shadow`: "steps" so far, and how many of them would have been "clipped" and "skipped".

        Waits for the device: not for every step. Empty without `shadow`.
        """
        return {}

    def detach(self) -> None:
        """Stop watching. DDP's communication hook stays and goes on averaging, so ranks may detach at any time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


class DisabledWatch(Watch):
    """Does nothing: the kill switch is on, or a rank could not attach."""


class ActiveWatch(Watch):
    """Measures, clips and records each step of one rank."""

    def __init__(
        self,
        *,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        plan: ParameterPlan,
        clip: Clip | None,
        skip: bool,
        shadow: bool,
        local_norms: bool,
        records: Records,
        recorder: RecorderProcess,
        strict: bool,
    ) -> None:
        self.enabled = True
        self._model = model
        self._optimizer = optimizer
        self._plan = plan
        self._clip = clip
        self._records = records
        self._recorder = recorder
        self._guard = Guard(records.ring, strict=strict)
        device = plan.device()
        self._row = Row(records.ring.layout.columns, len(plan.layers), device)
        self._weights = Weights(plan.parameters)
        self._averaged = AveragedGradient(plan)
        self._policies = Policies(clip=clip, skip=skip, device=device)
        self._kernel = Kernel(optimizer, clip, plan.parameters)
        self._shadow = Shadow(clip, device) if shadow else None
        alone = model.process_group.size() == 1
        self._local = (LoneRank if alone else LocalNorms)(plan) if local_norms else None
        self._sums = RankSums(model.process_group, device) if local_norms and not alone else None
        self._step = 0
        self._pending: tuple[int | None, Number | None] | None = None
        self._observes_after_step: bool | None = None
        self._edits = GradientEdits(plan.parameters)
        self._unedited: NormSummary | None = None
        self._step_hooks = StepHooks(optimizer, self)
        self._backward_end = BackwardEnd(plan.parameters, self.backward_ended, self._guard)
        _watches.add(self)

    # -- the script ----------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        if not self.enabled:
            return
        with self._guard:
            value = self._as_number(loss)
            if self._observes_after_step is None:
                # A script has one habit: it tells the loss before its optimizer's step, or after it.
                self._observes_after_step = self._records.sequence > 0
            if self._observes_after_step:
                self._records.observed(self._records.sequence, step=step, loss=value)
                self._step = self._step if step is None else step + 1
            else:
                self._pending = (step, value)
                self._step = self._step if step is None else step

    @property
    def tripped(self) -> bool:
        return self._policies.tripped

    def shadow_counts(self) -> dict[str, int]:
        return {} if self._shadow is None else self._shadow.counts()

    def detach(self) -> None:
        self.leave(Farewell.DETACHED)

    def watches(self, which: torch.optim.Optimizer | DistributedDataParallel) -> bool:
        """This is the optimizer of this watch, or its model."""
        return which is self._optimizer or which is self._model

    # -- the hooks, in the order of a step -----------------------------------------------------------------------

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """A bucket of this rank's own gradients, before its all-reduce."""
        if self.enabled and self._local is not None:
            with self._guard:
                if not getattr(self._model, "_has_rebuilt_buckets", True):
                    # Until DDP has seen in which order gradients arrive, a bucket is in the model's.
                    parameters, gradients = parameters[::-1], gradients[::-1]
                self._local.measure(parameters, gradients, first=first)

    def last_bucket(self) -> None:
        """Sum up this rank's gradients and start the sum over ranks: issued on every rank, whatever went wrong."""
        if self._sums is None or not isinstance(self._local, LocalNorms):
            return
        if self.enabled:
            with self._guard:
                self._local.close()
                loss = None if self._pending is None else self._pending[1]
                contribution = self._sums.contribution(self._local.summary, loss)
                self._sums.prepare(self._records.next_sequence, contribution)
        self._sums.issue()

    def backward_ended(self) -> None:
        """Remember what the gradients look like, so that a script's own clipping is noticed without a sync."""
        if not self.enabled or not self._model.require_backward_grad_sync:
            return
        self._unedited = None
        self._kernel.take_back()
        # The first time as well: nobody knows yet whether this script edits.
        suspected = self._edits.seen or not self._records.sequence
        if suspected:
            self._unedited = self._measure(self._averaged.gradients(), self._records.next_sequence)
        self._edits.backward_ended()

    def before_step(self) -> None:
        """The gradients are averaged and final: measure, rule, clip, write the record.

        Each part has a guard of its own, since an error on one rank must cost its record and nothing else: this rank
        clips as the others do, and counts its steps as they do.
        """
        if not self.enabled:
            return
        edited, opened, followed = self._edits.seen, False, False
        summary, ruling, row, scale, loss_scale = None, None, None, None, None
        rate = float("nan")
        with self._guard:
            self._kernel.take_back()
            self._backward_end.rearm()
            edited = self._edited()
        with self._guard:
            rate = self._learning_rate()
            self._records.launch(step=self._step, learning_rate=rate, flags=EDITED if edited else 0)
            opened = True
        with self._guard:
            # Which the gradients still carry; the loss may have had one that they do not carry any more.
            scale = self._kernel.scale
            loss_scale = scale_of_caller() if scale is None else scale
            gradients = self._averaged.gradients()
            summary = self._summary(gradients, edited=edited, scale=scale, loss_scale=loss_scale)
            ruling = self._rule(summary.total, rate, edited=edited)
            row = self._act(ruling, gradients, scale)
            followed = True
        if not followed:
            with self._guard:
                self._act_plainly(ruling, rate, edited=edited)
        with self._guard:
            if opened and summary is not None and row is not None:
                self._write_row(summary, loss_scale, *row)
        with self._guard:
            if opened and self._pending is not None:
                step, loss = self._pending
                self._records.observed(self._records.sequence, step=step, loss=loss)
        self._pending = None
        self._step += 1
        with self._guard:
            self._check_hook_order()
            self._recorder.check(self._records.ring, time.monotonic())

    def after_step(self) -> None:
        """The optimizer has stepped."""
        with self._guard:
            self._kernel.take_back()

    # -- the end -------------------------------------------------------------------------------------------------

    def leave(self, reason: Farewell, detail: str = "") -> None:
        """Say goodbye once; wait at most two seconds for the last acknowledgement."""
        if not self.enabled:
            return
        self.enabled = False
        with self._guard:
            self._step_hooks.remove()
            self._backward_end.remove()
            self.after_step()
        with self._guard:
            self._records.flush()
            if self._shadow is not None:
                announce(self._shadow.line(), rank=self._model.process_group.rank())
            self._records.ring.farewell(reason, detail)
            self._recorder.ensure()
            self._recorder.wait_for_farewell(self._records.ring)

    def _settle(self) -> None:
        """Bounded wait for the last sums: a process that ends with a collective under way may be aborted."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._sums is not None and self._sums.under_way() and time.monotonic() < deadline:
            time.sleep(0.001)

    def leave_at_exit(self) -> None:
        """The interpreter ends, by itself or by an exception that nobody caught."""
        with self._guard:
            # A detached watch, too, takes part in every sum.
            self._settle()
        error = getattr(sys, "last_value", None)
        if error is None:
            self.leave(Farewell.FINISHED)
        else:
            self.leave(Farewell.EXCEPTION, f"{type(error).__name__}: {error}")

    # -- parts of a step -----------------------------------------------------------------------------------------

    def _measure(self, gradients: list[Tensor], sequence: int) -> NormSummary:
        return self._averaged.measure(gradients, largest=due(sequence))

    def _summary(
        self, gradients: list[Tensor], *, edited: bool, scale: Number | None, loss_scale: Number | None
    ) -> NormSummary:
        """Norms of the averaged gradient, unscaled, and from before the script's own edits."""
        unedited = self._unedited if edited else None
        summary = self._measure(gradients, self._records.sequence) if unedited is None else unedited
        # At the end of backward every gradient carries the loss's scale.
        carried = scale if unedited is None else loss_scale
        return summary if carried is None else summary.unscaled(carried)

    def _rule(self, norm: Number, rate: float, *, edited: bool) -> Ruling:
        ruling = self._policies.rule(norm, learning_rate=rate, left_out=self._kernel.found_inf)
        # What the script has clipped is not clipped again; it may be left out all the same.
        return Ruling(skip=ruling.skip) if edited else ruling

    def _act(
        self, ruling: Ruling, gradients: list[Tensor], scale: Number | None
    ) -> tuple[Number | None, Number | None]:
        """Do what was ruled, or only count it: the clip coefficient, and the column `shadow`."""
        if self._shadow is not None:
            return None, self._shadow.count(ruling, gradients, scale)
        return self._kernel.follow(ruling, gradients, scale), None

    def _act_plainly(self, ruling: Ruling | None, rate: float, *, edited: bool) -> None:
        """Where that has failed on this rank: the same by other means, to rounding."""
        scale = self._kernel.scale
        if ruling is None:
            ruling = self._rule(self._averaged.plain_norm(scale), rate, edited=edited)
        if self._shadow is None:
            self._kernel.follow_plainly(ruling, self._averaged.gradients(), scale)

    def _write_row(
        self, summary: NormSummary, scale: Number | None, coefficient: Number | None, shadow: Number | None
    ) -> None:
        """Write the record's row, or stage it. scale: of the loss."""
        row = self._row.filled(
            summary,
            scale=scale,
            coefficient=coefficient,
            found_inf=self._kernel.found_inf,
            shadow=shadow,
            local=None if self._local is None else self._local.own(self._averaged, summary, scale),
            sums=self._sums,
            weights=self._weights.look(self._records.sequence),
        )
        self._records.measured(row)

    def _edited(self) -> bool:
        """The script changed the gradients since backward: its norms are then those at the end of backward."""
        known = self._edits.seen
        edited = self._edits.before_step()
        if edited and not known:
            line = "the script changes gradients between backward and step (clip_grad_norm_ or the like)"
            advice = "; Foreshock does not clip them again: remove that call to let it" if self._clip else ""
            say_once("edited", line + advice)
        return edited

    def _learning_rate(self) -> float:
        rate = self._optimizer.param_groups[0]["lr"]
        # A tensor on a device would have to be waited for.
        return float(rate) if not isinstance(rate, Tensor) or rate.is_cpu else float("nan")

    def _as_number(self, loss: Tensor | float | None) -> Number | None:
        if loss is None or not isinstance(loss, Tensor):
            return None if loss is None else float(loss)
        return number(loss.mean(dtype=torch.float64) if loss.dim() else loss)

    def _check_hook_order(self) -> None:
        if self._clip is not None and not self._step_hooks.is_last():
            line = "another step pre-hook was registered after attach: what it does to gradients is not clipped"
            say_once("hook order", line)


def is_watched(which: torch.optim.Optimizer | DistributedDataParallel) -> bool:
    """An attach to it has not been detached."""
    return any(watch.enabled and watch.watches(which) for watch in _watches)


_watches: weakref.WeakSet[ActiveWatch] = weakref.WeakSet()


def _go_inert() -> None:
    for watch in _watches:
        watch.enabled = False


# A DataLoader's worker is a copy of the rank: it must neither write into the rank's ring nor say goodbye for it.
os.register_at_fork(after_in_child=_go_inert)
