"""Watches one rank: each step is measured, decided, applied and recorded, one stage after another."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import NormSummary
from foreshock._control.apply import DryRun
from foreshock._handle import Watch
from foreshock._hooks.backward import BackwardHooks, StepHooks
from foreshock._hooks.guard import Guard
from foreshock._hooks.sharded import ShardedHooks
from foreshock._log import rank_zero_info
from foreshock._measure.rank_sums import wait_for_sums
from foreshock._measure.script import Habit, Observations, log_changed_parameters, log_dropped_passes, observation_of
from foreshock._mirror.mirror import Mirror
from foreshock._output import leaving
from foreshock._output.leaving import Ending, ending_by
from foreshock._output.record import Record
from foreshock._output.recorder_process import CHECK_SECONDS, RecorderProcess
from foreshock._stages import Stages
from foreshock._step import Observation, Step
from foreshock._torch import has_rebuilt_buckets
from foreshock_recorder.layout import EDITED, GRADIENT_UNKNOWN, NOT_STEPPED, ExitReason

_EXIT_SECONDS = 0.5
"""Seconds to wait at exit for sums of a few numbers: only a rank that is gone takes longer."""
_PASSES_WITHOUT_STEP = 8
"""Backward passes in a row with dropped gradients: a GradScaler that searches for its scale drops fewer."""


class ActiveWatch(Watch):
    """Watches the steps of one rank.

    Each part runs under a guard of its own, since an error on one rank must cost its record and nothing else: this rank
    clips as the others do, and counts its steps as they do.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        rank: int,
        ranks: int,
        optimizer: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        stages: Stages,
        clips: bool,
        by_bucket: bool,
        record: Record,
        recorder: RecorderProcess,
        strict: bool,
    ) -> None:
        # Nothing of ours keeps a model alive: its end is the end of the watch.
        self._model: weakref.ref[Any] = weakref.ref(model, leaving.with_model(self))
        self._optimizer = optimizer
        self._clips, self._by_bucket, self._record, self._recorder = clips, by_bucket, record, recorder
        self.guard = Guard(record.ring, strict=strict)
        self._arithmetic, self.rank, self._ranks = arithmetic, rank, ranks
        self._control, self._measure = stages.control, stages.measure
        self._decide, self._apply = stages.decide, stages.apply
        self.sums = record.sums = stages.sums
        self._next_number = 0
        self.steps = 0
        """Steps of the optimizer that this watch has seen."""
        self._observations = Observations()
        self._observed = True
        """Whether the newest record has an observation, or is of no step."""
        self._skips = False
        """Whether the script has skipped a step after its backward pass."""
        self._dropped = 0
        """Backward passes in a row whose gradients no step has used."""
        self.observed_of_pass: Callable[[object], tuple[Tensor | None, int | None]] | None = None
        """Returns the loss of a step's passes so far, and its number; None where the script observes."""
        self.missed_passes = 0
        """Steps whose backward passes came before attach: 1 under `foreshock run`."""
        self.mirror: Mirror | None = None
        self._step_hooks = StepHooks(optimizer, self, clips=clips)
        self.backward_hooks: BackwardHooks | ShardedHooks | None = None
        """Hooks of the model, which call this watch."""
        self.enabled, self.idle, self.run = True, False, recorder.run
        leaving.arrived(self, record.ring.path)

    def __del__(self) -> None:
        # The optimizer, whose hooks hold this, is gone.
        if self.enabled:
            self.leave(leaving.ending_of_model(), wait=False)

    def observe(self, *, loss: Tensor | float | None = None, step: int | None = None) -> None:
        if self.enabled:
            try:
                self._observe(loss, step)
            except Exception as error:
                self.guard.count(error)

    @property
    def tripped(self) -> bool:
        return self._decide.tripped

    def dry_run_counts(self) -> dict[str, int]:
        return self._apply.counts() if isinstance(self._apply, DryRun) else {}

    def state_dict(self) -> dict[str, float | None]:
        return self._decide.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._decide.load_state_dict(state_dict)

    def detach(self) -> None:
        self.leave(Ending(ExitReason.DETACHED))

    def _leave_block(self, error: BaseException | None) -> None:
        self.leave(Ending(ExitReason.DETACHED) if error is None else ending_by(error))

    def _observe(self, loss: Any, number: Any) -> None:
        observation = observation_of(loss, number, self._arithmetic)
        of_newest, earlier = self._observations.add(observation, unobserved=not self._observed)
        if of_newest:
            self._record.observe(observation)
            self._observed = True
            self._next_number = self._next_number if observation.step is None else observation.step + 1
        elif earlier is not None and self._all_observe():
            # No backward pass came of it: the script has skipped the batch.
            self._record_skipped(earlier, None)
        elif self._observations.habit is Habit.AFTER_STEP and self._measure.at_end is None:
            # No step has followed the pass, and its gradients may soon be gone.
            self._measure.measure_at_end(self._record.sequence + 1)

    def arrived(self, parameter: Tensor) -> None:
        """Learn the order in which gradients arrive."""
        self.guard.run(self._measure.arrived, parameter)

    def backward_began(self, first: Tensor) -> None:
        """Record the pass before if its gradients were dropped without a step."""
        if not self.enabled:
            return
        try:
            if self._observations.passed and self._measure.edits.dropped(first):
                self._skip_pass()
            if self._control.is_changed():
                self._update_parameters()
            if self.observed_of_pass is not None:
                self._observations.habit = Habit.BEFORE_BACKWARD
                self._observe(*self.observed_of_pass((self.steps, self._dropped)))
        except Exception as error:
            self.guard.count(error)

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool, last: bool) -> None:
        """Measure a bucket of this rank's own gradients; prepare the sum over ranks with the last one."""
        local, model = self._measure.local, self._model()
        if not self.enabled or local is None or model is None:
            return
        try:
            if not has_rebuilt_buckets(model):
                # Not yet in the order of arrival.
                parameters, gradients = parameters[::-1], gradients[::-1]
            local.add(parameters, gradients, first=first)
            if last:
                local.close()
            if last and self.sums is not None:
                self.sums.prepare(self._record.sequence + 1, local, self._observations.pending)
        except Exception as error:
            self.guard.count(error)

    def backward_computed(self) -> None:
        """Mark that this rank waits for the others from here on; measure its own gradient."""
        local = self._measure.local
        if not self.enabled:
            return
        try:
            self._record.ring.count_backward_pass()
            if local is not None and not self._by_bucket:
                local.measure(self._measure.order)
        except Exception as error:
            self.guard.count(error)

    def prepare_sum(self) -> None:
        """Set what this rank adds to the sum over ranks, beside its shards."""
        if self.enabled and self.sums is not None:
            self.guard.run(self.sums.prepare, self._record.sequence + 1, None, self._observations.pending)

    def backward_ended(self, *, averaged: bool, sums: bool) -> None:
        """Remember the averages, so that the script's edits are noticed; prepare the sum over ranks."""
        local, pending = self._measure.local, self._observations.pending
        if not self.enabled:
            return
        try:
            self._observations.backward_ended(averaged=averaged)
            if averaged:
                measure, sequence = self._measure, self._record.sequence + 1
                measure.at_end = measure.norm_at_end = None
                looks = measure.edits.backward_ended(sequence, sequence - self.missed_passes)
                if looks or self._skips:
                    measure.measure_at_end(sequence)
                if self._control.scaler is not None:
                    self._control.backward_ended()
        except Exception as error:
            self.guard.count(error)
        try:
            if sums and local is not None and self.sums is not None:
                self.sums.prepare(self._record.sequence + 1, local, pending)
        except Exception as error:
            self.guard.count(error)

    def before_step(self) -> None:
        """Measure, decide, apply, record: the gradients are averaged and final."""
        if not self.enabled:
            return
        step = Step(sequence=self._record.sequence + 1, number=self._next_number, edited=self._measure.edits.seen)
        compare = self._measure.edits.compare
        parts = (self._observations.stepped, compare, self._confirm_edit, self._prepare, self._record.begin)
        self._run_each(parts, step)
        stages = (self._control.read, self._measure.measure, self._decide.decide, self._apply.apply)
        step.complete = self._run_all(stages, step)
        if not step.complete:
            self.guard.run(self._fall_back, step)
        self._observed, self._dropped, self._next_number = step.observation is not None, 0, step.number + 1
        self.steps += 1
        self._run_each((self._record.write, self._check), step)

    def after_step(self, *_: Any) -> None:
        """Restore the optimizer: it has stepped."""
        try:
            self._control.restore()
        except Exception as error:
            self.guard.count(error)

    def _run_each(self, parts: Iterable[Callable[[Step], None]], step: Step) -> None:
        """Run parts of a step that do not depend on each other."""
        for part in parts:
            try:
                part(step)
            except Exception as error:
                self.guard.count(error)

    def _run_all(self, stages: Iterable[Callable[[Step], None]], step: Step) -> bool:
        """Run stages that each need the one before. Return whether all have succeeded."""
        try:
            for stage in stages:
                stage(step)
        except Exception as error:
            self.guard.count(error)
            return False
        return True

    def _confirm_edit(self, step: Step) -> None:
        """Note that the script edits gradients, where it does: each rank must answer alike."""
        measure, touched = self._measure, step.edited
        if touched:
            try:
                confirmed = measure.confirms_edit(step)
            except Exception as error:
                self.guard.count(error)
                confirmed = measure.confirms_edit(step, fallback=True)
            if confirmed:
                measure.edits.log_once(clips=self._clips)
        step.flags = EDITED if step.edited else 0
        edits = measure.edits
        if not (touched or self._skips or edits.compares or edits.ignores_versions):
            measure.at_end = measure.norm_at_end = None

    def _prepare(self, step: Step) -> None:
        """Fill in what the host knows."""
        if self._control.is_changed():
            self._update_parameters()
        step.learning_rate = self._control.learning_rate

    def _fall_back(self, step: Step) -> None:
        """Clip and skip as the other ranks do, where a stage has failed on this one."""
        if step.decision is None:
            self._control.read(step)
            self._measure.measure_fallback(step)
            self._decide.decide_fallback(step)
        self._apply.apply_fallback(step)

    def _check(self, _: Step) -> None:
        ring, now = self._record.ring, time.monotonic()
        if self.idle:
            self.idle = False
            self._recorder.resume(ring)
        if due := now - self._recorder.checked >= CHECK_SECONDS:
            self._recorder.check(ring, now)
        if self.mirror is not None:
            self.mirror.update(ring, now)
        # Whoever called `sys.exit` was caught.
        leaving.exits.called = None
        if due or self.steps <= 2:
            leaving.pause_others(self)

    def _update_parameters(self) -> None:
        """Measure and clip what the optimizer holds by now, parameters added since attach included."""
        model = self._model()
        measure = None if model is None else self._measure.updated(model)
        if measure is None:
            return
        log_changed_parameters(len(measure.plan.parameters))
        self._measure = measure
        self._control.clip_only(measure.plan.parameters)

    def _skip_pass(self, *, at_end: bool = False) -> None:
        """Record that no step followed the newest backward pass. at_end: of the run, so its gradients still exist."""
        skipped = self._observations.skipped()
        # Where the script observes nothing, dropping gradients may be its design.
        observation = None if self.observed_of_pass is not None else skipped
        self._skips = True
        self._dropped += 1
        if self._dropped == _PASSES_WITHOUT_STEP:
            log_dropped_passes(self._dropped)
        summary = self._measure.at_end
        if summary is None and at_end:
            summary = self._measure.measure_at_end(self._record.sequence + 1)
        # Some scripts drop gradients by design (a GAN's other model); on a device it is not known yet what they are.
        # All ranks must decide alike, for their records to match.
        finite = True if summary is None else self._arithmetic.finite(summary.total)
        if finite is not True or (observation is not None and (at_end or self._all_observe())):
            self._record_skipped(observation, summary, passed=True)

    def _skip_rest(self) -> None:
        """Record what was observed or measured last and had no step: the run ends."""
        if self._observations.passed:
            self._skip_pass(at_end=True)
        pending, self._observations.pending = self._observations.pending, None
        if pending is not None:
            self._record_skipped(pending, None)

    def _record_skipped(
        self, observation: Observation | None, summary: NormSummary | None, *, passed: bool = False
    ) -> None:
        """Write a record without a step. summary: of the averaged gradient, scaled. passed: backward had ended."""
        number = self._next_number if observation is None or observation.step is None else observation.step
        step = Step(sequence=self._record.sequence + 1, number=number, complete=True, observation=observation)
        step.flags = NOT_STEPPED | (GRADIENT_UNKNOWN if summary is None else 0)
        step.learning_rate = self._control.learning_rate
        step.loss_scale = self._control.newest_scale
        if summary is not None:
            step.summary = self._arithmetic.unscaled(summary, step.loss_scale)
        if passed:
            self._measure.measure_local(step, step.summary or self._record.nothing)
        self._record.begin(step)
        self._record.write(step)
        if observation is not None and observation.step is not None:
            self._next_number = step.number + 1
        self._observed = True

    def _all_observe(self) -> bool:
        """Return whether every rank observes its loss, by the newest sum: then all make this record."""
        return self._ranks == 1 or self._record.ranks_with_loss == self._ranks

    def leave(self, ending: Ending, *, wait: bool = True) -> None:
        """Report the exit, once. wait: at most two seconds, for the last records to be acknowledged."""
        if not self.enabled:
            return
        self.guard.run(self._skip_rest)
        self.enabled = False
        self.guard.run(self._step_hooks.remove)
        if self.backward_hooks is not None:
            self.guard.run(self.backward_hooks.leave)
        self.after_step()
        # A device that has failed, or hangs, must not cost the exit's own report.
        self.guard.run(self._log_dry_run, wait=wait)
        self.guard.run(self._record.close)
        self.guard.run(leaving.report, self._record.ring, self._recorder, ending, wait=wait)
        if self.mirror is not None:
            self.guard.run(self.mirror.close, self._record.ring)

    def pause(self) -> None:
        """Become idle until the next step. Unless that comes soon, the training counts as finished until then."""
        self.idle = True
        self._record.ring.write_idle(True)
        self._record.drain()

    def leave_at_exit(self) -> None:
        """Leave at the interpreter's end, whether it ends normally or by an uncaught exception."""
        # A detached watch, too, takes part in every sum.
        self.guard.run(wait_for_sums, _EXIT_SECONDS)
        self.leave(leaving.ending_now())

    def go_inert(self) -> None:
        """Do nothing more: this is a forked copy of the rank."""
        self.enabled = False

    def watches(self, which: object) -> bool:
        """Return whether this is the watch's optimizer or model."""
        return which is self._optimizer or which is self._model()

    def expect_no_clipping(self) -> None:
        """Take a gradient that is multiplied by 1 for no edit: a trainer does so, to log the norm."""
        self._measure.edits.expect_no_clipping()

    def _log_dry_run(self, *, wait: bool) -> None:
        if self._record.flush() and wait and isinstance(self._apply, DryRun):
            rank_zero_info(self._apply.line(), rank=self.rank)
