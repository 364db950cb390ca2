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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foreshock._clip import Clip, NormClip, ValueClip
from foreshock._console import say_once
from foreshock._edits import GradientEdits
from foreshock._guard import Guard
from foreshock._hooks import BackwardEnd, StepHooks
from foreshock._launch import RecorderProcess
from foreshock._local import LocalNorms, RankSums
from foreshock._norms import NormSummary, gradient_norms, summarize
from foreshock._records import Records
from foreshock._rows import Row
from foreshock._summary import ParameterPlan
from foreshock._weights import Weights
from foreshock_recorder.ring import Farewell

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
        self._fused = clips_in_kernel(optimizer)
        self._records = records
        self._recorder = recorder
        self._guard = Guard(records.ring, strict=strict)
        device = plan.device()
        self._row = Row(records.ring.layout.columns, len(plan.layers), device)
        self._weights = Weights(plan.parameters)
        self._indices: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        self._local = LocalNorms(plan) if local_norms else None
        self._sums = RankSums(model.process_group, device) if local_norms else None
        self._step = 0
        self._pending: tuple[int | None, Tensor | None] | None = None
        self._observes_after_step: bool | None = None
        self._edits = GradientEdits(plan.parameters)
        self._unedited: NormSummary | None = None
        self._ours: Tensor | None = None
        self._theirs: Tensor | None = None
        self._step_hooks = StepHooks(optimizer, self)
        self._backward_end = BackwardEnd(plan.parameters, self.backward_ended)
        _watches.add(self)

    # -- the script ----------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        if not self.enabled:
            return
        with self._guard:
            value = self._as_scalar(loss)
            if self._observes_after_step is None:
                # A script has one habit: it tells the loss before its optimizer's step, or after it.
                self._observes_after_step = self._records.sequence > 0
            if self._observes_after_step:
                self._records.observed(self._records.sequence, step=step, loss=value)
                self._step = self._step if step is None else step + 1
            else:
                self._pending = (step, value)
                self._step = self._step if step is None else step

    def detach(self) -> None:
        self.leave(Farewell.DETACHED)

    def watches(self, optimizer: torch.optim.Optimizer) -> bool:
        """This is the optimizer of this watch."""
        return self._optimizer is optimizer

    # -- the hooks, in the order of a step -----------------------------------------------------------------------

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """A bucket of this rank's own gradients, before its all-reduce."""
        if self.enabled and self._local is not None:
            with self._guard:
                self._local.measure(parameters, gradients, first=first)

    def last_bucket(self) -> None:
        """Sum up this rank's gradients and start the sum over ranks: issued on every rank, whatever went wrong."""
        if self._local is None or self._sums is None:
            return
        contribution = None
        if self.enabled:
            with self._guard:
                self._local.close()
                loss = None if self._pending is None else self._pending[1]
                contribution = self._sums.contribution(self._local.summary, loss)
        self._sums.issue(self._records.next_sequence, contribution)

    def backward_ended(self) -> None:
        """Remember what the gradients look like, so that a script's own clipping is noticed without a sync."""
        if not self.enabled or not self._model.require_backward_grad_sync:
            return
        with self._guard:
            self._unedited = None
            self._take_back()
            # The first time as well: nobody knows yet whether this script edits.
            suspected = self._edits.seen or not self._records.sequence
            self._unedited = self._measure() if suspected else None
            self._edits.backward_ended()

    def before_step(self) -> None:
        """The gradients are averaged and final: measure, clip, write the record.

        Each part has a guard of its own, since an error on one rank must cost its record and nothing else: this rank
        clips as the others do, and counts its steps as they do.
        """
        if not self.enabled:
            return
        edited, opened = self._edits.seen, False
        summary, coefficient = None, None
        with self._guard:
            self._take_back()
            self._backward_end.rearm()
            edited = self._edited()
        with self._guard:
            self._records.launch(step=self._step, learning_rate=self._learning_rate(), edited=edited)
            opened = True
        scale = getattr(self._optimizer, "grad_scale", None)
        with self._guard:
            summary = self._unedited if edited and self._unedited is not None else self._measure()
            if scale is not None:
                summary = summary.unscaled(scale.double())
            coefficient = self._row.constants[1.0] if edited else self._apply_clip(summary, scale)
        if coefficient is None and not edited:
            with self._guard:
                self._clip_by_itself(scale)
        with self._guard:
            if opened and summary is not None and coefficient is not None:
                self._write_row(summary, self._edits.scale if scale is None else scale.double(), coefficient)
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
            self._take_back()

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

    def _measure(self) -> NormSummary:
        present = tuple(i for i, p in enumerate(self._plan.parameters) if p.grad is not None)
        if self._indices is None or self._indices[0] != present:
            device = self._row.device
            layer_of = torch.tensor([self._plan.layer_of[i] for i in present], dtype=torch.int64, device=device)
            self._indices = (present, torch.tensor(present, dtype=torch.int64, device=device), layer_of)
        gradients = [self._plan.parameters[i].grad for i in present]
        norms = gradient_norms([g for g in gradients if g is not None]).to(self._row.device)
        return summarize(norms, self._indices[1], self._indices[2], len(self._plan.layers))

    def _apply_clip(self, summary: NormSummary, scale: Tensor | None) -> Tensor:
        """Clip by the policy; the coefficient that the optimizer will have applied, float64 scalar."""
        one = self._row.constants[1.0]
        if isinstance(self._clip, ValueClip):
            if scale is not None:
                say_once("scaler", "ValueClip cannot clip gradients that GradScaler has still scaled; use NormClip")
                return one
            gradients = self._gradients()
            torch._foreach_clamp_min_(gradients, -self._clip.clip_value)
            torch._foreach_clamp_max_(gradients, self._clip.clip_value)
            return one
        if not isinstance(self._clip, NormClip):
            return one
        divisor = self._clip.divisor(summary.total)
        if divisor.is_cpu and float(divisor) == 1.0:
            return one
        coefficient = divisor.reciprocal()
        # Whatever may fail comes before this: gradients are touched last, once.
        if self._fused:
            self._lend((divisor if scale is None else divisor * scale).to(torch.float32))
        else:
            torch._foreach_mul_(self._gradients(), coefficient)
        return coefficient

    def _clip_by_itself(self, scale: Tensor | None) -> None:
        """Where measuring has failed on this rank: clip by other means than those, to rounding as the others do."""
        gradients = self._gradients()
        if isinstance(self._clip, ValueClip) and scale is None:
            nn.utils.clip_grad_value_(self._plan.parameters, self._clip.clip_value)
        elif isinstance(self._clip, NormClip) and gradients:
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
            total = torch.linalg.vector_norm(norms)
            divisor = self._clip.divisor(total if scale is None else total / scale)
            torch._foreach_mul_(gradients, divisor.reciprocal())

    def _lend(self, divisor: Tensor) -> None:
        """Give the optimizer's kernel a divisor for this step."""
        self._theirs = getattr(self._optimizer, "grad_scale", None)
        self._ours = divisor
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]

    def _take_back(self) -> None:
        """Put the optimizer back as it was, also after a step that raised: the divisor would be taken for a scale.

        Put back and not deleted: GradScaler deletes what it set there itself.
        """
        ours, self._ours = self._ours, None
        if ours is not None and getattr(self._optimizer, "grad_scale", None) is ours:
            self._optimizer.grad_scale = self._theirs  # type: ignore[attr-defined]

    def _write_row(self, summary: NormSummary, scale: Tensor | None, coefficient: Tensor) -> None:
        """Stage the record's row. scale: of the loss, float64 scalar."""
        row = self._row.filled(
            summary,
            scale=scale,
            coefficient=coefficient,
            found_inf=getattr(self._optimizer, "found_inf", None),
            local=None if self._local is None else self._local.summary,
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

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._plan.parameters if p.grad is not None]

    def _learning_rate(self) -> float:
        rate = self._optimizer.param_groups[0]["lr"]
        # A tensor on a device would have to be waited for.
        return float(rate) if not isinstance(rate, Tensor) or rate.is_cpu else float("nan")

    def _as_scalar(self, loss: Tensor | float | None) -> Tensor | None:
        if loss is None:
            return None
        if not isinstance(loss, Tensor):
            return torch.tensor(float(loss), dtype=torch.float64)
        return loss.detach().to(torch.float64).mean()

    def _check_hook_order(self) -> None:
        if self._clip is not None and not self._step_hooks.is_last():
            line = "another step pre-hook was registered after attach: what it does to gradients is not clipped"
            say_once("hook order", line)


def clips_in_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """The optimizer's kernel divides by `grad_scale` itself: fused Adam, AdamW, SGD and Adagrad."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and all(group.get("fused") for group in optimizer.param_groups)


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """An attach to this optimizer has not been detached."""
    return any(watch.enabled and watch.watches(optimizer) for watch in _watches)


_watches: weakref.WeakSet[ActiveWatch] = weakref.WeakSet()


def _go_inert() -> None:
    for watch in _watches:
        watch.enabled = False


# A DataLoader's worker is a copy of the rank: it must neither write into the rank's ring nor say goodbye for it.
os.register_at_fork(after_in_child=_go_inert)
