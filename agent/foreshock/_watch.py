"""Watches one rank's training steps, hook by hook; it decides nothing by waiting."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from foreshock import _leaving
from foreshock._action import Action
from foreshock._clip import Clip
from foreshock._guard import Guard
from foreshock._handle import Watch
from foreshock._hooks import BackwardEnd, StepHooks
from foreshock._launch import RecorderProcess, announce
from foreshock._leaving import Ending, ending_by
from foreshock._local import LocalNorms, RankSums, settle
from foreshock._log import rank_zero_info_once, rank_zero_warn_once
from foreshock._measures import Measures
from foreshock._norms import NormSummary
from foreshock._numbers import Number, finite
from foreshock._observed import Habit, Observations, Told, told_by_script
from foreshock._records import Records
from foreshock._rows import Row
from foreshock._scaler import Scaler
from foreshock._summary import ParameterPlan
from foreshock_recorder.layout import EDITED, GRADIENT_UNKNOWN, NOT_STEPPED, ExitReason

_SETTLE_SECONDS = 0.5
"""For sums of a few numbers: only a rank that is gone takes longer."""
_PASSES_WITHOUT_STEP = 8
"""Backward passes in a row whose gradients were dropped: a GradScaler that looks for its scale drops fewer."""


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
        # Nothing of ours keeps a model alive: its end is the end of the watch.
        self._model = weakref.ref(model, _leaving.with_model(self))
        self._optimizer = optimizer
        self._clip = clip
        self._records = records
        self._recorder = recorder
        self._guard = Guard(records.ring, strict=strict)
        device = plan.device()
        self.rank, self._ranks = model.process_group.rank(), model.process_group.size()
        self._row = Row(records.ring.layout.columns, len(plan.layers), device)
        self._action = Action(optimizer, plan.parameters, clip=clip, skip=skip, shadow=shadow, device=device)
        alone, views = self._ranks == 1, model.gradient_as_bucket_view
        self._measures = Measures(plan, optimizer, local_norms=local_norms, alone=alone, views=views)
        self.sums = RankSums(model.process_group, device) if local_norms and not alone else None
        self._scaler = Scaler()
        self._step = 0
        self.steps = 0
        """Of the optimizer, that this watch has seen."""
        self._observations = Observations()
        self._observed = True
        """Something has been told of the newest record, or it is of no step."""
        self._leaves_out = False
        """The script has been seen to leave a step out after its backward pass."""
        self._dropped = 0
        """Backward passes in a row whose gradients no step has used."""
        self._edits_seen = False
        self._step_hooks = StepHooks(optimizer, self)
        self._backward_end = BackwardEnd(self, self._guard)
        self._backward_end.watch(plan.parameters)
        self.enabled = True
        self.retired = False
        _leaving.arrived(self, records.ring.path)

    def __del__(self) -> None:
        # The optimizer is gone, which holds the hooks that hold this.
        if self.enabled:
            self.leave(_leaving.ending_of_model(), wait=False)

    # -- the script ----------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        if not self.enabled:
            return
        with self._guard:
            told = told_by_script(loss, step)
            of_newest, left = self._observations.tell(told, unobserved=not self._observed)
            if of_newest:
                self._records.observed(self._records.sequence, step=told.step, loss=told.loss)
                self._observed = True
                self._step = self._step if told.step is None else told.step + 1
            elif left is not None and self._all_tell():
                # No backward pass came of it: the script has left the batch out.
                self._tell_left_out(left, None)
            elif self._observations.habit is Habit.AFTER_STEP and self._measures.at_end is None:
                # No step has followed the pass, and its gradients may soon be gone.
                self._measures.at_end = self._measures.measure(self._records.next_sequence)

    @property
    def tripped(self) -> bool:
        return self._action.policies.tripped

    def shadow_counts(self) -> dict[str, int]:
        return {} if self._action.shadow is None else self._action.shadow.counts()

    def detach(self) -> None:
        self.leave(Ending(ExitReason.DETACHED))

    def _leave_block(self, error: BaseException | None) -> None:
        self.leave(Ending(ExitReason.DETACHED) if error is None else ending_by(error))

    def watches(self, which: object) -> bool:
        """This is the optimizer of this watch, or its model."""
        return which is self._optimizer or which is self._model()

    # -- the hooks, in the order of a step -----------------------------------------------------------------------

    def backward_began(self, first: Tensor) -> None:
        """The first gradients of a backward pass are there."""
        if not self.enabled:
            return
        if self._observations.passed and self._measures.edits.dropped(first):
            self._leave_pass_out()
        self._follow_optimizer()

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """A bucket of this rank's own gradients, before its all-reduce."""
        if self.enabled and self._measures.local is not None:
            with self._guard:
                if not getattr(self._model(), "_has_rebuilt_buckets", True):
                    # Until DDP has seen in which order gradients arrive, a bucket is in the model's.
                    parameters, gradients = parameters[::-1], gradients[::-1]
                self._measures.local.measure(parameters, gradients, first=first)

    def last_bucket(self) -> None:
        """Sum up this rank's gradients, for the sum over ranks that starts now."""
        local = self._measures.local
        if self.enabled and self.sums is not None and isinstance(local, LocalNorms):
            with self._guard:
                local.close()
                pending = self._observations.pending
                contribution = self.sums.contribution(local.summary, None if pending is None else pending.loss)
                self.sums.prepare(self._records.next_sequence, contribution)

    def backward_computed(self) -> None:
        """This rank waits for the others from here on, if they have not computed theirs."""
        if self.enabled and self._averages():
            self._records.ring.count_backward_pass()

    def backward_ended(self) -> None:
        """Remember what the gradients look like, so that a script's own clipping is noticed without a sync."""
        if not self.enabled:
            return
        averaged = self._averages()
        self._observations.backward_ended(averaged=averaged)
        if not averaged:
            return
        measures = self._measures
        measures.at_end = None
        self._action.kernel.take_back()
        # The first time as well: nobody knows yet what this script does between here and its step.
        if self._edits_seen or self._leaves_out or not self._records.sequence:
            measures.at_end = measures.measure(self._records.next_sequence)
        measures.edits.backward_ended()
        self._scaler.look()

    def before_step(self) -> None:
        """The gradients are averaged and final: measure, rule, clip, write the record.

        Each part has a guard of its own, since an error on one rank must cost its record and nothing else: this rank
        clips as the others do, and counts its steps as they do.
        """
        if not self.enabled:
            return
        edited, opened, followed = self._edits_seen, False, False
        summary, ruling, row, scale, loss_scale = None, None, None, None, None
        told: Told | None = None
        rate = math.nan
        with self._guard:
            self._action.kernel.take_back()
            self._follow_optimizer()
            edited = self._edited()
        with self._guard:
            told = self._observations.stepped()
        step = self._step if told is None or told.step is None else told.step
        with self._guard:
            rate = self._action.learning_rate()
            self._records.begin_step(step=step, learning_rate=rate, flags=EDITED if edited else 0)
            opened = True
        with self._guard:
            # Which the gradients still carry; the loss may have had one that they do not carry any more.
            scale = self._action.kernel.scale
            loss_scale = self._scaler.of_caller() if scale is None else scale
            gradients = self._measures.averaged.gradients()
            summary = self._summary(edited=edited, scale=scale, loss_scale=loss_scale)
            ruling = self._action.rule(summary.total, rate, edited=edited)
            row = self._action.follow(ruling, gradients, scale)
            followed = True
        if not followed:
            with self._guard:
                self._action.follow_plainly(ruling, self._measures.averaged, rate, edited=edited)
        with self._guard:
            if opened and summary is not None and row is not None:
                self._write_row(summary, loss_scale, *row)
        with self._guard:
            if opened and told is not None:
                self._records.observed(self._records.sequence, step=told.step, loss=told.loss)
        self._observed, self._dropped, self._step = told is not None, 0, step + 1
        self.steps += 1
        with self._guard:
            self._check_hook_order()
            if not self.retired:
                self._recorder.check(self._records.ring, time.monotonic())
            _leaving.went_on(self)

    def after_step(self) -> None:
        """The optimizer has stepped."""
        with self._guard:
            self._action.kernel.take_back()

    # -- the end -------------------------------------------------------------------------------------------------

    def leave(self, ending: Ending, *, wait: bool = True) -> None:
        """Say goodbye once. wait: two seconds at most for the last acknowledgement, after the last records."""
        if not self.enabled:
            return
        with self._guard:
            self._leave_rest_out()
        self.enabled = False
        with self._guard:
            self._step_hooks.remove()
            self._backward_end.remove()
            self.after_step()
        # A device that has failed, or hangs, must not cost the goodbye, which says so.
        with self._guard:
            if self._records.flush() and wait and self._action.shadow is not None:
                announce(self._action.shadow.line(), rank=self.rank)
        with self._guard:
            if not self.retired:
                _leaving.say(self._records.ring, self._recorder, ending, wait=wait)

    def retire(self) -> None:
        self.retired = True
        with self._guard:
            self._records.flush()
        self._records.close()
        with self._guard:
            _leaving.say(self._records.ring, self._recorder, Ending(ExitReason.FINISHED), wait=False)

    def leave_at_exit(self) -> None:
        """The interpreter ends, by itself or by an exception that nobody caught."""
        with self._guard:
            # A detached watch, too, takes part in every sum.
            settle(_SETTLE_SECONDS)
        self.leave(_leaving.ending_now())

    def go_inert(self) -> None:
        """This is a forked copy of the rank."""
        self.enabled = False

    # -- what no step followed -----------------------------------------------------------------------------------

    def _leave_pass_out(self, *, at_end: bool = False) -> None:
        """No step followed the newest backward pass. at_end: of the run, so its gradients are still there."""
        told = self._observations.left_out()
        self._leaves_out = True
        self._dropped += 1
        if self._dropped == _PASSES_WITHOUT_STEP:
            rank_zero_warn_once(
                "no step",
                f"gradients are computed, but the watched optimizer has not stepped for {self._dropped} backward "
                "passes: nothing is clipped; attach to the optimizer that steps",
            )
        summary = self._measures.at_end
        if summary is None and at_end:
            summary = self._measures.measure(self._records.next_sequence)
        # Some scripts drop gradients by design (a GAN's other model); on a device nobody knows yet what they are. All
        # ranks must decide alike, for their records to meet.
        known = None if summary is None else finite(summary.total)
        bad = known is not None and known is not True
        if bad or (told is not None and (at_end or self._all_tell())):
            self._tell_left_out(told, summary, passed=True)

    def _leave_rest_out(self) -> None:
        """The run ends: what was told or measured last had no step."""
        if self._observations.passed:
            self._leave_pass_out(at_end=True)
        pending, self._observations.pending = self._observations.pending, None
        if pending is not None:
            self._tell_left_out(pending, None)

    def _tell_left_out(self, told: Told | None, summary: NormSummary | None, *, passed: bool = False) -> None:
        """A record of it. summary: of the averaged gradient, scaled; None: not known. passed: backward was over."""
        step = self._step if told is None or told.step is None else told.step
        flags = NOT_STEPPED | (GRADIENT_UNKNOWN if summary is None else 0)
        self._records.begin_step(step=step, learning_rate=self._action.learning_rate(), flags=flags)
        scale = self._scaler.newest
        whole = self._row.nothing if summary is None else summary if scale is None else summary.unscaled(scale)
        row = self._row.filled(
            whole,
            scale=scale,
            coefficient=None,
            found_inf=None,
            shadow=None,
            local=self._measures.own(whole, scale) if passed else None,
            sums=self.sums,
            weights=None,
        )
        self._records.measured(row)
        if told is not None:
            self._records.observed(self._records.sequence, step=told.step, loss=told.loss)
        self._step = step if told is None or told.step is None else step + 1
        self._observed = True

    def _all_tell(self) -> bool:
        """Every rank tells its loss, as far as the newest sum over them says: then all have this to tell as well."""
        return self._ranks == 1 or self._records.losses_told == self._ranks

    # -- parts of a step -----------------------------------------------------------------------------------------

    def _averages(self) -> bool:
        """This backward pass averages; it does not only accumulate."""
        model = self._model()
        return model is not None and bool(model.require_backward_grad_sync)

    def _follow_optimizer(self) -> None:
        """What it holds by now is measured and clipped, also what was added since."""
        model = self._model()
        measures = None if model is None else self._measures.followed(model)
        if measures is None:
            return
        count = len(measures.plan.parameters)
        rank_zero_info_once(
            f"{count} parameters", f"the optimizer's parameters have changed: {count} are measured and clipped"
        )
        self._measures = measures
        self._action.kernel.clips(measures.plan.parameters)
        self._backward_end.watch(measures.plan.parameters)

    def _summary(self, *, edited: bool, scale: Number | None, loss_scale: Number | None) -> NormSummary:
        """Norms of the averaged gradient, unscaled, and from before the script's own edits."""
        at_end = self._measures.at_end if edited or self._leaves_out else None
        summary = self._measures.measure(self._records.sequence) if at_end is None else at_end
        # At the end of backward every gradient carries the loss's scale.
        carried = scale if at_end is None else loss_scale
        return summary if carried is None else summary.unscaled(carried)

    def _write_row(
        self, summary: NormSummary, scale: Number | None, coefficient: Number | None, shadow: Number | None
    ) -> None:
        """Write the record's row, or stage it. scale: of the loss."""
        weights = self._measures.weights.look(self._records.sequence)
        row = self._row.filled(
            summary,
            scale=scale,
            coefficient=coefficient,
            found_inf=self._action.kernel.found_inf,
            shadow=shadow,
            local=self._measures.own(summary, scale),
            sums=self.sums,
            weights=weights,
        )
        self._records.measured(row, weights)

    def _edited(self) -> bool:
        """The script changed the gradients since backward: its norms are then those at the end of backward."""
        known = self._edits_seen
        changed = self._measures.edits.before_step()
        # Without a backward pass to compare with: what the script is known for.
        edited = known if changed is None else changed
        self._edits_seen = known or edited
        if edited and not known:
            line = "the script changes gradients between backward and step (clip_grad_norm_ or similar)"
            advice = (
                "; Foreshock does not clip them again; remove that call to let Foreshock clip" if self._clip else ""
            )
            log_once = rank_zero_warn_once if self._clip else rank_zero_info_once
            log_once("edited", line + advice)
        return edited

    def _check_hook_order(self) -> None:
        if self._clip is not None and not self._step_hooks.is_last():
            rank_zero_warn_once(
                "hook order", "another step pre-hook was registered after attach; its changes are not clipped"
            )
