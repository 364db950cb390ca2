"""Decides about the steps of one rank by the kernels, or from the same numbers by tensor operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Number
from foreshock._control.clip import AdaptiveClip, Clip, NormClip
from foreshock._control.decide import Decide, Memory, SpentFlags
from foreshock._control.history import Rates, loaded, planned_change, saved
from foreshock._control.optimizer import OptimizerControl
from foreshock._kernels.launches import StepKernel
from foreshock._measure.rank_sums import RankSums
from foreshock._step import Step, StepDecision


class KernelDecide:
    """Decides about the steps of one rank, and writes their records, in one launch: see `Decide`."""

    def __init__(
        self,
        kernel: StepKernel,
        arithmetic: Arithmetic,
        control: OptimizerControl,
        sums: RankSums | None,
        *,
        clip: NormClip | AdaptiveClip | None,
        skip: bool,
        dry_run: bool,
    ) -> None:
        self._kernel = kernel
        self._arithmetic = arithmetic
        self._control = control
        self._sums = sums
        self._clip: Clip | None = clip
        self._skip = skip
        self._acts = not dry_run
        self._keeps_history = skip or isinstance(clip, AdaptiveClip)
        self._rates = Rates()
        self._spent = SpentFlags(kernel.device)

    def decide(self, step: Step) -> None:
        """Fill in the decision, whose numbers are those that the optimizer takes, and the words of the record."""
        kernel, measured = self._kernel, self._kernel.measured
        assert measured is not None
        planned, rates = planned_change(self._rates, step.learning_rate)
        can_skip = self._skip and (not self._acts or self._control.can_skip())
        decision = StepDecision(
            divisor=None if self._clip is None or step.edited else kernel.divisor,
            skip=kernel.skips if can_skip else None,
        )
        columns = {} if step.weights is None else dict(step.weights.columns)
        if measured.largest is not None:
            columns["gradient_absolute_maximum"] = self._unscaled(measured.largest, measured.carried)
        number, loss = step.observation or (None, None)
        kernel.decide(
            measured,
            sequence=step.sequence,
            planned=planned,
            edited=step.edited,
            can_skip=can_skip,
            loss_scale=step.loss_scale,
            optimizer_scale=step.grad_scale,
            found_inf=step.found_inf,
            reduced=None if self._sums is None else self._sums.arrived(step.loss_scale),
            columns=columns,
            loss=loss,
            number=number,
        )
        # Nothing above may fail after the launch: a step that is decided again would be learned twice.
        step.decision, step.words, self._rates = decision, kernel.words, rates
        if self._skip:
            self._spent.add(kernel.spent)

    def decide_fallback(self, step: Step) -> None:
        """Decide by tensor operations, from the kernels' history and budget, and give them what follows."""
        kernel = self._kernel
        rules = Decide(self._arithmetic, kernel.device, clip=self._clip, skip=self._skip)
        rules.memory = self.memory
        rules.decide(step)
        kernel.memory = rules.memory
        _, self._rates = planned_change(self._rates, step.learning_rate)
        if self._skip:
            self._spent.add(kernel.spent)

    def state_dict(self) -> dict[str, float | None]:
        """Return the history of norms, empty if none is kept. Waits for the device."""
        history = self.memory.history
        return {} if history is None or not self._keeps_history else saved(history)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Continue this history, if one is kept. Raises `SettingsError`."""
        if values and self._keeps_history:
            numbers, self._rates = loaded(values, self._arithmetic)
            self._kernel.load_history(numbers)

    @property
    def memory(self) -> Memory:
        """What is remembered from step to step, as tensor operations take it."""
        history, budget = self._kernel.memory
        assert history is not None
        return Memory((history[0], self._rates), budget)

    @property
    def tripped(self) -> bool:
        """Whether the budget had run out `TRIP_LAG` steps ago: the same answer on every rank at the same step."""
        return self._spent.tripped

    def _unscaled(self, value: Number, scale: Number | None) -> Number:
        return value if scale is None else self._arithmetic.ratio(value, scale)
