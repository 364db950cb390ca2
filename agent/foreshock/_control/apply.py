"""Applies the decision on a step: through the optimizer, by changing the gradients, or, in a dry run, not at all."""

from __future__ import annotations

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._control.clip import Clip, ValueClip
from foreshock._control.optimizer import OptimizerControl
from foreshock._step import Step
from foreshock._torch import foreach_multiply_

CLIPPED, SKIPPED = 1.0, 2.0
"""Bits of the column `shadow`."""


class Apply:
    """Applies decisions on one rank."""

    def __init__(self, arithmetic: Arithmetic, control: OptimizerControl, clip: Clip | None) -> None:
        self._arithmetic = arithmetic
        self._control = control
        self._clamp = clip if isinstance(clip, ValueClip) else None

    def apply(self, step: Step) -> None:
        """Clip or skip as decided; fill in the clip coefficient."""
        decision = step.decision
        assert decision is not None
        divisor = decision.divisor
        # Dividing by exactly 1 would be a pass over the gradients for nothing.
        if divisor is not None and self._arithmetic.is_one(divisor):
            divisor = None
        coefficient = None if divisor is None else 1.0 / divisor
        # Whatever may fail comes before this: gradients are touched last, once.
        if decision.skip is not None:
            self._control.skip(step, decision.skip)
        if self._clamp is not None:
            self._clamp_(self._clamp, step)
        step.coefficient = coefficient
        if divisor is not None and coefficient is not None:
            whole = divisor if step.grad_scale is None else divisor * step.grad_scale
            if not self._control.divide(whole):
                foreach_multiply_(step.gradients, coefficient)

    def apply_fallback(self, step: Step) -> None:
        """Do the same by other means, up to rounding, where `apply` or a stage before it has failed on this rank."""
        self._control.restore()
        decision = step.decision
        assert decision is not None
        if decision.skip is not None:
            self._control.skip(step, decision.skip)
        if self._clamp is not None:
            self._clamp_(self._clamp, step)
        if decision.divisor is not None:
            for gradient in step.gradients:
                gradient.mul_(1.0 / decision.divisor)

    def _clamp_(self, clip: ValueClip, step: Step) -> None:
        if step.grad_scale is not None:
            # A GradScaler lets the optimizer unscale: elements must be unscaled before they are compared.
            foreach_multiply_(step.gradients, self._arithmetic.ratio(1.0, step.grad_scale))
            self._control.keep_undivided()
        clip.clamp_(step.gradients)


class DryRun:
    """Applies nothing, and counts what would have been done, without a read-back."""

    def __init__(self, arithmetic: Arithmetic, _: OptimizerControl, clip: Clip | None) -> None:
        self._arithmetic = arithmetic
        self._clamp = clip if isinstance(clip, ValueClip) else None
        self._zero = self._clipped = self._skipped = arithmetic.constant(0.0)
        self._steps = 0

    def apply(self, step: Step) -> None:
        """Fill in what would have been done, as the column `shadow` encodes it."""
        decision, counted = step.decision, self._arithmetic.counted
        assert decision is not None
        clipped, skipped = self._zero, self._zero
        if decision.divisor is not None:
            clipped = counted(decision.divisor > 1.0)
        elif self._clamp is not None and step.gradients:
            scale = 1.0 if step.grad_scale is None else step.grad_scale
            clipped = counted(self._clamp.would_clamp(self._arithmetic, step.gradients, scale))
        if decision.skip is not None:
            skipped = counted(decision.skip)
        self._clipped, self._skipped = self._clipped + clipped, self._skipped + skipped
        self._steps += 1
        step.shadow = CLIPPED * clipped + SKIPPED * skipped

    def apply_fallback(self, step: Step) -> None:
        """Do nothing, as `apply`."""

    def counts(self) -> dict[str, int]:
        """Return the steps so far, and how many would have been clipped and skipped. Waits for the device."""
        return {"steps": self._steps, "clipped": int(self._clipped), "skipped": int(self._skipped)}

    def line(self) -> str:
        """Return the counts as a line for the log."""
        counts = self.counts()
        would = f"{counts['clipped']} would have been clipped and {counts['skipped']} skipped"
        return f"dry run: of {counts['steps']} steps {would}"
