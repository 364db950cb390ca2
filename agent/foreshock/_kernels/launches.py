"""Launches the kernels that follow the measurement of gradients, and keeps what they remember from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foreshock._arithmetic.norms import Number
from foreshock._control.clip import AdaptiveClip, NormClip
from foreshock._control.decide import WINDOW, BudgetState, Memory
from foreshock._control.history import Rates
from foreshock._kernels import step as triton_step
from foreshock._kernels.tables import GradientSums, ParameterOrder, current_device, sent
from foreshock._measure.rank_sums import SUM_FIELDS, FinishedSum
from foreshock_protos.columns import MEASURED_COLUMNS, MEASURED_NAMES, REDUCED_COLUMNS
from foreshock_recorder.layout import HAS_LOSS, HAS_STEP, OBSERVED, RECORD_ROW

OBSERVED_WORDS = OBSERVED.words + 2
"""Words of the observed part, from its payload to its end marker."""
_WARPS = 4


class OrderedSums(NamedTuple):
    """Holds measured gradients, and the order in which the first bad parameter is found."""

    sums: GradientSums
    order: ParameterOrder


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Holds what a step is decided from."""

    averaged: OrderedSums
    local: OrderedSums | None = None
    """This rank's own gradient; None if not measured."""
    carried: Number | None = None
    """Loss scale that the averaged gradient contained when it was measured; None if none."""
    largest: Number | None = None
    """Largest absolute value of an element, scaled as the averaged gradient; None if not measured on this step."""


class StepKernel:
    """Launches `finish_step`, and keeps what it decides by: history, budget and counts of the dry run.

    Every number that is passed to it is a float64 tensor without dimensions, on the device.
    """

    def __init__(
        self, layers: int, device: torch.device, *, clip: NormClip | AdaptiveClip | None, skip: bool, dry_run: bool
    ) -> None:
        self.device = device
        self._current = current_device(device)
        self._skip, self._dry_run = skip, dry_run
        kinds = (
            triton_step.NO_CLIP,
            triton_step.ADAPTIVE_CLIP if isinstance(clip, AdaptiveClip) else triton_step.NORM_CLIP,
        )
        self._clip: int = kinds[clip is not None].value
        self.turn = 0
        """Index of the next step in the budget's window."""
        self._zero, self._one = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device).unbind()
        self._no_sums = torch.zeros(len(SUM_FIELDS), dtype=torch.float64, device=device)
        self._defaults = torch.tensor([c.missing for c in MEASURED_COLUMNS], dtype=torch.float64, device=device)
        self._positions: dict[tuple[str, ...], Tensor] = {}
        state = torch.zeros(triton_step.STATE_SIZE, dtype=torch.float64)
        state[triton_step.LIMIT.value] = math.inf if clip is None or clip.max_norm is None else clip.max_norm
        for index, column in enumerate(REDUCED_COLUMNS):
            state[triton_step.SUMS.value + index] = column.missing
        self.state = state.to(device)
        """[STATE_SIZE]: what is remembered from step to step."""
        self.words = torch.zeros(RECORD_ROW + len(MEASURED_COLUMNS) + 2 * layers + 2, dtype=torch.int64, device=device)
        """[RECORD_ROW + columns + 2]: the newest record as the ring has it, from the observed part's payload to the
        measured part's end marker."""
        self._observed = self.words[:RECORD_ROW]
        self.row = self.words[RECORD_ROW:-2].view(torch.float64)
        """[columns]: the measured part of the newest record."""
        self.checksum = self.words[-2:]
        """[2]: the row's checksum and its sequence number."""
        self.coefficient = self.row[triton_step.COEFFICIENT.value]
        """float64: what multiplies the newest step's gradient."""
        self._decision = torch.ones(2, dtype=torch.float32, device=device)
        self.divisor, self.skips = self._decision.unbind()
        """float32: what the optimizer takes as `grad_scale`, its own scale included, and as `found_inf`."""
        self._later = torch.zeros(OBSERVED_WORDS, dtype=torch.int64, device=device)
        self._cleared = False
        self.measured: Measurement | None = None
        """What the next step is decided from."""
        self.spent = self.state[triton_step.SPENT.value]
        """1 once the budget has run out, else 0."""

    def measure(self, sums: GradientSums, gradients: list[Tensor | None]) -> None:
        """Launch the measurement of the averaged gradient, as `GradientSums.measure`."""
        self._cleared = False
        sums.measure(gradients, self.checksum)
        self._cleared = True

    def decide(
        self,
        measured: Measurement,
        *,
        sequence: int,
        planned: bool = False,
        edited: bool = False,
        can_skip: bool = True,
        loss_scale: Number | None = None,
        optimizer_scale: Number | None = None,
        found_inf: Number | None = None,
        reduced: FinishedSum | None = None,
        columns: Mapping[str, Number] | None = None,
        loss: Number | None = None,
        number: int | None = None,
    ) -> None:
        """Decide on a step and write its record. The arguments are those of `finish_step`.

        reduced: a sum over ranks that has arrived since the last step. columns: what else the record has, by name.
        loss, number: what the script observed of the step.
        """
        if not self._cleared:
            # A second record of the same measurement.
            self.checksum[:1].zero_()
        averaged, local, carried = measured.averaged, measured.local, measured.carried
        flags = (
            (0 if local is None else triton_step.HAS_LOCAL.value)
            | (0 if reduced is None else triton_step.HAS_SUMS.value)
            | (triton_step.PLANNED.value if planned else 0)
            | (triton_step.EDITED.value if edited else 0)
            | (0 if can_skip else triton_step.CANNOT_SKIP.value)
        )
        own = averaged if local is None else local
        table = averaged.sums.table
        one = self._one
        defaults = self._with(columns) if columns else self._defaults
        observed = observed_flags(number)
        self._cleared = False
        with self._current:
            triton_step.finish_step[(table.layers + 1,)](
                self._observed,
                self._zero if loss is None else loss,
                self.row,
                self.checksum,
                defaults,
                self.state,
                self._decision,
                averaged.sums.squares,
                averaged.sums.statuses,
                averaged.sums.measurement,
                averaged.order.positions,
                averaged.order.numbers,
                own.sums.squares,
                own.sums.statuses,
                own.sums.measurement,
                own.order.positions,
                own.order.numbers,
                table.layer_begin,
                table.chunks,
                table.parameters,
                table.layers,
                one if carried is None else carried,
                one if loss_scale is None else loss_scale,
                one if optimizer_scale is None else optimizer_scale,
                self._zero if found_inf is None else found_inf,
                self._no_sums if reduced is None else reduced.values,
                one if reduced is None or reduced.scale is None else reduced.scale,
                0 if reduced is None else reduced.sequence,
                flags,
                self.turn,
                sequence,
                number or 0,
                observed,
                CLIP=self._clip,
                SKIP=self._skip,
                DRY_RUN=self._dry_run,
                SUM_BLOCK=triton_step.SUM_BLOCK,
                LAYER_BLOCK=triton_step.LAYER_BLOCK,
                num_warps=_WARPS,
            )
        self.turn = (self.turn + 1) % WINDOW

    def contribute(self, local: OrderedSums, loss: Number | None, contribution: Tensor) -> None:
        """Write this rank's part of the sum over ranks. contribution: float64, [len(SUM_FIELDS)]."""
        sums, table = local.sums, local.sums.table
        with self._current:
            triton_step.contribute[(1,)](
                sums.squares,
                table.chunks,
                sums.statuses,
                sums.measurement,
                local.order.positions,
                table.parameters,
                self._zero if loss is None else loss,
                int(loss is not None),
                contribution,
                BLOCK=triton_step.SUM_BLOCK,
                num_warps=_WARPS,
            )

    def write_observed(self, loss: Number, number: int | None, sequence: int) -> Tensor:
        """Return the observed part of a record whose step is over, from payload to end marker: int64, [5]."""
        with self._current:
            triton_step.write_observed[(1,)](self._later, loss, number or 0, observed_flags(number), sequence)
        return self._later

    def compile(self, averaged: OrderedSums) -> None:
        """Run each kernel once, on no gradients at all, which changes nothing."""
        gradients: list[Tensor | None] = [None] * averaged.sums.table.parameters
        self.measure(averaged.sums, gradients)
        self.contribute(averaged, None, self._no_sums.clone())
        self.write_observed(self._zero, None, 0)
        self.decide(Measurement(averaged=averaged), sequence=0)
        self.turn = 0

    @property
    def memory(self) -> Memory:
        """What decisions remember from step to step, as tensor operations take it; the learning rate is not known."""
        numbers = self.state.clone().unbind()
        begin = triton_step.WINDOW.value
        window = numbers[begin:]
        budget = BudgetState(
            (*window[self.turn :], *window[: self.turn]),
            *numbers[triton_step.SKIPPED.value : triton_step.SPENT.value + 1],
        )
        mean, recent, deviation, count, spikes, accepting = numbers[: triton_step.ACCEPTING.value + 1]
        return Memory(((mean, recent, deviation, count, spikes, accepting), Rates()), budget)

    @memory.setter
    def memory(self, memory: Memory) -> None:
        """Take over what a step has changed that tensor operations have decided: the next step of the window."""
        if memory.history is not None:
            self.load_history(memory.history[0])
        if memory.budget is not None:
            newest, *counts = memory.budget
            self.state[triton_step.SKIPPED.value : triton_step.SPENT.value + 1] = torch.stack(
                [*map(torch.as_tensor, counts)]
            )
            self.state[triton_step.WINDOW.value + self.turn] = newest[-1]
        self.turn = (self.turn + 1) % WINDOW

    def load_history(self, numbers: Sequence[Number]) -> None:
        """Replace the history of norms."""
        self.state[: triton_step.ACCEPTING.value + 1] = torch.stack([*map(torch.as_tensor, numbers)])

    def dry_run_counts(self) -> tuple[int, int]:
        """Return how many steps would have been clipped and skipped. Waits for the device."""
        counts = self.state[[triton_step.DRY_RUN_CLIPPED.value, triton_step.DRY_RUN_SKIPPED.value]].tolist()
        return int(counts[0]), int(counts[1])

    def _with(self, columns: Mapping[str, Number]) -> Tensor:
        names = tuple(columns)
        if names not in self._positions:
            self._positions[names] = sent([*map(MEASURED_NAMES.index, names)], torch.int64, self.device)
        values = torch.stack([torch.as_tensor(value) for value in columns.values()])
        return self._defaults.index_copy(0, self._positions[names], values.to(torch.float64))


def observed_flags(number: int | None) -> int:
    """Return the flags of an observed part with a loss, and with a step number if there is one."""
    return HAS_LOSS | (0 if number is None else HAS_STEP)
