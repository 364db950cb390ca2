"""Which step, or which backward pass that no step followed, the script's observations belong to.

A script has one habit: it tells its loss before the backward pass, between that and the optimizer's step, or after the
step. What is told without a step to it is not lost: a script's own guard, or a GradScaler, has left the step out.
"""

from __future__ import annotations

import operator
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreshock._log import rank_zero_warn_once
from foreshock._numbers import Number, number

_STEPS = range(-(2**53), 2**53)


class Told(NamedTuple):
    """What one `observe` told."""

    step: int | None
    loss: Number | None


class Habit(Enum):
    """When a script tells."""

    BEFORE_BACKWARD = auto()
    BEFORE_STEP = auto()
    AFTER_STEP = auto()


class Observations:
    """Of one rank. `passed`: a backward pass has ended, with averaged gradients, and no step has followed it yet."""

    def __init__(self) -> None:
        self.habit: Habit | None = None
        """Not known before it shows."""
        self.passed = False
        self.pending: Told | None = None
        """For the next backward pass."""
        self._any_pass = False
        """A backward pass, with averaging or without, has ended since `pending` was told."""
        self._of_pass: Told | None = None
        self._own = False
        """It was told for the newest pass, not for an earlier one of several that accumulate..."""
        self._late = False
        """... and after it had ended."""

    def tell(self, told: Told, *, unobserved: bool) -> tuple[bool, Told | None]:
        """Take one in. unobserved: the newest record is of a step, and nothing has been told of it.

        Returns whether it belongs to the newest record; and an earlier one that no backward pass has followed.
        """
        if not self.passed:
            if self.habit is None and unobserved:
                self.habit = Habit.AFTER_STEP
            if self.habit is Habit.AFTER_STEP:
                return True, None
        elif self.habit is not Habit.BEFORE_BACKWARD and (self.habit is not None or not self._own):
            # The step may still follow, or it was left out: what comes next will show.
            self._of_pass, self._own, self._late = _joined(self._of_pass if self._own else None, told), True, True
            return False, None
        before, self.pending = self.pending, told
        if before is None or self._any_pass:
            self._any_pass = False
            return False, None
        if _complement(before, told):
            self.pending = _joined(before, told)
            return False, None
        return False, before

    def backward_ended(self, *, averaged: bool) -> None:
        """A backward pass is over. averaged: not one that only accumulates."""
        self._any_pass = True
        if not averaged:
            return
        self._own = False
        if self.pending is not None:
            self._of_pass, self._own, self._late = self.pending, True, False
            self.pending = None
        self.passed = True

    def stepped(self) -> Told | None:
        """The optimizer steps: what was told of it before."""
        told = self.left_out() if self.passed else None
        if told is None:
            told, self.pending = self.pending, None
        elif self.habit is None:
            self.habit = Habit.BEFORE_STEP if self._late else Habit.BEFORE_BACKWARD
        return told

    def left_out(self) -> Told | None:
        """No step followed the newest backward pass: what was told of it."""
        told, self._of_pass = self._of_pass, None
        self.passed = False
        return told


def told_by_script(loss: Any, step: Any) -> Told:
    """An observation from what the script gave; an argument that is none costs a line, said once, and nothing else."""
    return Told(_step(step), _loss(loss))


def _step(step: Any) -> int | None:
    # Asking a tensor on a device would wait for it.
    there = isinstance(step, Tensor) and not step.is_cpu
    try:
        whole = None if step is None or there else operator.index(step)
    except TypeError:
        whole = None
    if step is not None and (whole is None or whole not in _STEPS):
        rank_zero_warn_once(
            "observe step", f"observe: step must be an integer, not {_shown(step)}; steps are counted instead"
        )
        return None
    return whole


def _loss(loss: Any) -> Number | None:
    if loss is None:
        return None
    try:
        if isinstance(loss, Tensor):
            return number(loss.detach().mean(dtype=torch.float64) if loss.dim() else loss)
        return float(loss)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        rank_zero_warn_once(
            "observe loss", f"observe: loss must be a tensor or a number, not {_shown(loss)}; it is not recorded"
        )
        return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} on {value.device}"
    if isinstance(value, (int, float, str)):
        return repr(value)[:40]
    return f"of type {type(value).__name__}"


def _complement(before: Told, after: Told) -> bool:
    return not any(a is not None and b is not None for a, b in zip(before, after, strict=True))


def _joined(before: Told | None, after: Told) -> Told:
    if before is None:
        return after
    return Told(before.step if after.step is None else after.step, before.loss if after.loss is None else after.loss)
