"""What a script does: it observes steps, and edits gradients between the end of backward and the step.

Observations belong to steps, or to backward passes that no step followed.

A script has one habit: it observes its loss before the backward pass, between that and the optimizer's step, or after
the step. An observation without a step is not lost: a script's own guard, or a `GradScaler`, has skipped the step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Number
from foreshock._log import rank_zero_info_once, rank_zero_warn_once
from foreshock._measure.late_flag import LateFlag
from foreshock._step import Observation, Step
from foreshock._torch import version_of

_STEPS = range(-(2**53), 2**53)
_COMPARED_EVERY = 100
"""Steps from one comparison of norms to the next: each costs a second read of the gradients."""
SAME = 1e-3
"""Relative difference of norms up to which they are those of the same gradients: what a loss scale rounds is less."""
_REPEATED = 1e-6
"""Relative difference of norms up to which they are those of the same values, added up in float32 in another order."""


class Habit(Enum):
    """Says when a script observes."""

    BEFORE_BACKWARD = auto()
    BEFORE_STEP = auto()
    AFTER_STEP = auto()


class Observations:
    """Keeps the observations of one rank until their step."""

    def __init__(self) -> None:
        self.habit: Habit | None = None
        """The script's habit; None until it shows."""
        self.passed = False
        """Whether a backward pass has ended, with averaged gradients, and no step has followed it yet."""
        self.pending: Observation | None = None
        """Observation for the next backward pass."""
        self._any_pass = False
        """Whether a backward pass, averaged or not, has ended since `pending` was observed."""
        self._of_pass: Observation | None = None
        self._own = False
        """Whether it is of the newest pass, not of an earlier one of several that accumulate."""
        self._late = False
        """Whether it was made after its pass had ended."""

    def add(self, observation: Observation, *, unobserved: bool) -> tuple[bool, Observation | None]:
        """Add one. unobserved: the newest record is of a step, and has no observation.

        Returns whether it belongs to the newest record; and an earlier one that no backward pass has followed.
        """
        if not self.passed:
            if self.habit is None and unobserved:
                self.habit = Habit.AFTER_STEP
            if self.habit is Habit.AFTER_STEP:
                return True, None
        elif self.habit is not Habit.BEFORE_BACKWARD and (self.habit is not None or not self._own):
            # The step may still follow, or it was skipped: the next event will show.
            self._of_pass, self._own, self._late = (
                _joined(self._of_pass if self._own else None, observation),
                True,
                True,
            )
            return False, None
        before, self.pending = self.pending, observation
        if before is None or self._any_pass:
            self._any_pass = False
            return False, None
        if _complement(before, observation):
            self.pending = _joined(before, observation)
            return False, None
        return False, before

    def backward_ended(self, *, averaged: bool) -> None:
        """Note the end of a backward pass. averaged: it does not only accumulate."""
        self._any_pass = True
        if not averaged:
            return
        self._own = False
        if self.pending is not None:
            self._of_pass, self._own, self._late = self.pending, True, False
            self.pending = None
        self.passed = True

    def stepped(self, step: Step) -> None:
        """Fill in what the script observed of the step that the optimizer makes now, if it has already."""
        observation, self._of_pass = (self._of_pass if self.passed else None), None
        self.passed = False
        if observation is None:
            observation, self.pending = self.pending, None
        elif self.habit is None:
            self.habit = Habit.BEFORE_STEP if self._late else Habit.BEFORE_BACKWARD
        step.observation = observation
        if observation is not None and observation.step is not None:
            step.number = observation.step

    def skipped(self) -> Observation | None:
        """Return what the script observed of the newest backward pass, which no step followed."""
        observation, self._of_pass = self._of_pass, None
        self.passed = False
        return observation


class GradientEdits:
    """Notices a script's own clipping by the versions of the gradients; `GradScaler.unscale_` leaves them unchanged.

    The first and the last parameter stand for all: scripts clip all of a model, or its front or back part. What changes
    others, or goes through `.data`, shows in the norm only: that is compared now and then.

    A version alone proves nothing: `clip_grad_norm_` multiplies by exactly 1 where it does not clip, for example where
    a script calls it with an infinite norm to log what it returns. So from the first new version on, until a norm shows
    an edit, the norm is compared at each step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], arithmetic: Arithmetic, *, views: bool = False) -> None:
        """views: gradients are views of DDP's buckets, so that each changes the version of its neighbors too."""
        self._views = views
        self._arithmetic = arithmetic
        self.on_host = arithmetic.is_one(arithmetic.constant(1.0))
        """Whether norms are known at once."""
        self._ends = (parameters[0], parameters[-1])
        self._versions: tuple[int, ...] | None = None
        self._late = LateFlag(parameters[0].device)
        self.by_norm = False
        """Whether a norm has shown that the script edits gradients."""
        self.by_version = False
        """Whether the versions of the newest pass had changed before its step."""
        self.touched = False
        """Whether those of any pass had."""
        self.seen = False
        """Whether the script is known to edit gradients."""
        self.ignores_versions = False
        """Whether a version shows no edit: the script is known to multiply gradients by 1."""
        self._postponed = False
        """Whether the newest comparison of norms is to be made at the next step."""
        self.compares = False
        """Whether the norm at the end of backward is to be compared with that before the step."""

    def backward_ended(self, sequence: int, passes: int) -> bool:
        """Remember the versions; return whether the norm is needed too.

        sequence: of the record that the pass is for. passes: of different steps, this one included.
        """
        self._versions = self._now()
        if self._late.due == sequence:
            self.by_norm |= self._late.read()
        # The first time too: it is not known yet what this script does between here and its step.
        self.compares = passes % _COMPARED_EVERY == 1 or self._postponed
        # A factor that is NaN, as of an infinite norm, would hide which gradients were bad.
        return self.compares or self.by_norm or self.touched or self.seen or self.ignores_versions

    def compare(self, step: Step) -> None:
        """Fill in whether the script has edited the gradients, unless there is no backward pass to compare with."""
        versions, self._versions = self._versions, None
        self.by_version = versions is not None and not self.ignores_versions and versions != self._now()
        if versions is not None:
            self.touched |= self.by_version
            # An edit that a version shows may hide another one.
            self._postponed = self.by_version and self.compares
            step.edited = self.by_norm or self.by_version

    def differ(self, step: Step, before: Number, now: Number) -> bool:
        """Return whether the script has edited the gradients, and fill that in: by the norm. A device answers late.

        before: norm at the end of backward, which contains the loss scale. now: norm before the step.
        """
        a = self._arithmetic
        if step.grad_scale is None and step.loss_scale is not None:
            # They have been unscaled meanwhile.
            now = now * step.loss_scale
        flag = a.counted(a.absolute(now - before) > SAME * before)
        if a.is_one(flag):
            step.edited = self.by_norm = True
        else:
            self._late.add(step.sequence, flag)
        return self.by_norm

    def changed(self, step: Step, before: float, now: float) -> bool:
        """Return whether a new version comes with another norm. On the host; before, now: as `differ`."""
        if not math.isfinite(before):
            # A factor of 1 changes it too: NaN is equal to nothing.
            return self.seen
        scale = step.loss_scale if step.grad_scale is None else None
        if scale is None:
            return not abs(now - before) <= _REPEATED * before
        # They have been unscaled meanwhile.
        return not abs(now * float(scale) - before) <= SAME * before

    def expect_no_clipping(self) -> None:
        """Take a new version alone for no edit, where the norm comes too late to say so: on a device."""
        self.ignores_versions = not self.on_host

    def log_once(self, *, clips: bool) -> None:
        """Remember that the script edits gradients, and log that. clips: Foreshock would clip them."""
        if not self.seen:
            self.seen = True
            log_edits(clips=clips)

    def continue_from(self, before: GradientEdits) -> None:
        """Keep what is known of the script, where the optimizer holds other parameters than before."""
        self.by_norm, self.touched, self.seen = before.by_norm, before.touched, before.seen
        self.ignores_versions = before.ignores_versions

    def dropped(self, arrived: Tensor) -> bool:
        """Return, in a new backward pass, whether the gradients of the last one were dropped. Unknown is no.

        arrived: a parameter that already has its new gradient, and so shows nothing.
        """
        if self._versions is None:
            return False
        for parameter, version in zip(self._ends, self._versions, strict=True):
            if parameter is not arrived and version >= 0:
                return parameter.grad is None or (not self._views and version_of(parameter.grad) != version)
        return False

    def _now(self) -> tuple[int, ...]:
        first, last = self._ends[0].grad, self._ends[1].grad
        return (-1 if first is None else version_of(first), -1 if last is None else version_of(last))


def log_edits(*, clips: bool) -> None:
    """Log, once, that the script edits gradients. clips: Foreshock would clip them."""
    line = "the script changes gradients between backward and step (clip_grad_norm_ or similar)"
    if clips:
        advice = "; Foreshock does not clip them again; remove that call to let Foreshock clip"
        rank_zero_warn_once("edited", line + advice)
    else:
        rank_zero_info_once("edited", line)


def log_changed_parameters(count: int) -> None:
    """Log that the script has changed which parameters the optimizer holds. count: of those that are measured now."""
    line = f"the optimizer's parameters have changed: {count} are measured and clipped"
    rank_zero_info_once(f"{count} parameters", line)


def log_dropped_passes(count: int) -> None:
    """Log, once, that no step has followed so many backward passes."""
    rank_zero_warn_once(
        "no step",
        f"gradients are computed, but the watched optimizer has not stepped for {count} backward passes: nothing is "
        "clipped; attach to the optimizer that steps",
    )


def observation_of(loss: Any, step: Any, arithmetic: Arithmetic) -> Observation:
    """Return the observation; a wrong argument is logged once and ignored."""
    number, value = None, None
    try:
        # Asking a tensor on a device for its value would wait for it.
        if step is not None and not (isinstance(step, Tensor) and not step.is_cpu):
            number = operator.index(step)
    except TypeError:
        pass
    if step is not None and (number is None or number not in _STEPS):
        rank_zero_warn_once(
            "observe step", f"observe: step must be an integer, not {_shown(step)}; steps are counted instead"
        )
        number = None
    try:
        if isinstance(loss, Tensor):
            value = arithmetic.number(loss.detach().mean(dtype=torch.float64) if loss.dim() else loss)
        elif loss is not None:
            value = arithmetic.constant(float(loss))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        rank_zero_warn_once(
            "observe loss", f"observe: loss must be a tensor or a number, not {_shown(loss)}; it is not recorded"
        )
    return Observation(number, value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} on {value.device}"
    if isinstance(value, (int, float, str)):
        return repr(value)[:40]
    return f"of type {type(value).__name__}"


def _complement(before: Observation, after: Observation) -> bool:
    return not any(a is not None and b is not None for a, b in zip(before, after, strict=True))


def _joined(before: Observation | None, after: Observation) -> Observation:
    if before is None:
        return after
    return Observation(
        before.step if after.step is None else after.step, before.loss if after.loss is None else after.loss
    )
