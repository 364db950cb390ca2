"""Decides whether to scale a step's gradient, skip the step, or do nothing; does not act.

Every rank has the same averaged gradient, hence the same norm, history and budget, so all ranks reach the same
decision without communicating.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number
from foreshock._control.clip import AdaptiveClip, Clip
from foreshock._control.history import History, Standing, State, loaded, saved
from foreshock._step import Step, StepDecision

SKIPS_IN_A_ROW = 3
SKIPS_IN_WINDOW = 5
WINDOW = 100
"""Steps over which skips are counted: a run that needs more of them has a fault that skipping hides."""
TRIP_LAG = 8
"""Steps by which `watch.tripped` lags: the device is further behind only where it limits steps so small that waiting
for one costs nothing."""


class BudgetState(NamedTuple):
    """Holds what a budget remembers."""

    newest: tuple[Number, ...]
    """[WINDOW]: 1 for each of the newest steps that was skipped, else 0; the oldest first."""
    skipped: Number
    """Skips among them."""
    in_a_row: Number
    """Bad steps in a row."""
    spent: Number
    """1 once the budget has run out, else 0."""


class Memory(NamedTuple):
    """Holds what decisions remember from step to step."""

    history: State | None
    budget: BudgetState | None


class Decide:
    """Decides about the steps of one rank."""

    def __init__(self, arithmetic: Arithmetic, device: torch.device, *, clip: Clip | None, skip: bool) -> None:
        self._arithmetic = arithmetic
        self._clip = clip
        self._history = History(arithmetic) if skip or isinstance(clip, AdaptiveClip) else None
        self._budget = Budget(arithmetic, device) if skip else None

    def decide(self, step: Step) -> None:
        """Fill in the decision, from the norm and the learning rate."""
        assert step.norm is not None
        divisor, skip, standing = None, None, None
        if self._history is not None:
            standing = self._history.compare(step.norm, step.learning_rate)
        # What the script has clipped is not clipped again; it may still be skipped.
        if self._clip is not None and not step.edited:
            divisor = self._clip.divisor(self._arithmetic, step.norm, None if standing is None else standing.ceiling)
            if divisor is not None and step.edited_on_device is not None:
                divisor = self._arithmetic.where(step.edited_on_device, 1.0, divisor)
        if self._budget is not None and standing is not None:
            skip = self._budget.grant(self._is_bad(step, standing))
        # Last, so that a step that is decided again after an error is learned once.
        if self._history is not None and standing is not None:
            self._history.state = standing.after
        step.decision = StepDecision(divisor=divisor, skip=skip)

    def decide_fallback(self, step: Step) -> None:
        """Fill in the decision where a stage before it, or `decide`, has failed on this rank."""
        self.decide(step)

    def _is_bad(self, step: Step, standing: Standing) -> Flag:
        """Return whether the norm is not finite or far beyond history. A step that a `GradScaler` skips is no fault."""
        assert step.norm is not None
        bad = standing.far | (self._arithmetic.finite(step.norm) ^ True)
        return bad if step.found_inf is None else bad & (step.found_inf == 0)

    @property
    def tripped(self) -> bool:
        """Whether the budget had run out `TRIP_LAG` steps ago: the same answer on every rank at the same step."""
        return self._budget is not None and self._budget.tripped

    def state_dict(self) -> dict[str, float | None]:
        """Return the history of norms, empty if none is kept. Waits for the device."""
        return {} if self._history is None else saved(self._history.state)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Continue this history, if one is kept. Raises `SettingsError`."""
        if values and self._history is not None:
            self._history.state = loaded(values, self._arithmetic)

    @property
    def memory(self) -> Memory:
        """What is remembered from step to step."""
        history, budget = self._history, self._budget
        return Memory(None if history is None else history.state, None if budget is None else budget.state)

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if self._history is not None and memory.history is not None:
            self._history.state = memory.history
        if self._budget is not None and memory.budget is not None:
            self._budget.state = memory.budget


class Budget:
    """Limits how many steps are skipped."""

    def __init__(self, arithmetic: Arithmetic, device: torch.device) -> None:
        self._arithmetic = arithmetic
        zero = arithmetic.constant(0.0)
        self.state = BudgetState((zero,) * WINDOW, zero, zero, zero)
        self._spent = SpentFlags(device)

    def grant(self, bad: Flag) -> Flag:
        """Return whether a step that is bad may be skipped."""
        where = self._arithmetic.where
        newest, skipped, in_a_row, spent = self.state
        skipped = skipped - newest[0]
        granted = bad & (in_a_row < SKIPS_IN_A_ROW) & (skipped < SKIPS_IN_WINDOW)
        one = self._arithmetic.counted(granted)
        in_a_row, spent = where(bad, in_a_row + 1, 0.0), where(bad ^ granted, 1.0, spent)
        self._spent.add(spent)
        self.state = BudgetState((*newest[1:], one), skipped + one, in_a_row, spent)
        return granted

    @property
    def tripped(self) -> bool:
        """Whether it had run out `TRIP_LAG` steps ago."""
        return self._spent.tripped


class SpentFlags:
    """Follows whether the budget has run out, `TRIP_LAG` steps late.

    If each rank read the newest flag that has arrived, answers would differ and one rank would stop alone. So it is
    always the flag of that step, and it is waited for if it has not arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned: Tensor | None = None
        if device.type == "cuda":
            self._pinned = torch.zeros(TRIP_LAG + 1, dtype=torch.float64, pin_memory=True)
        self._flags: deque[tuple[Number, torch.cuda.Event | None]] = deque(maxlen=TRIP_LAG + 1)
        self._turn = 0
        self._tripped = False

    def add(self, spent: Number) -> None:
        """Add a step's flag, 1 or 0, without waiting for it."""
        if self._pinned is None:
            # A copy: the kernels go on to write the same number.
            self._flags.append((float(spent), None))
            return
        host = self._pinned[self._turn % (TRIP_LAG + 1)]
        self._turn += 1
        host.copy_(spent, non_blocking=True)  # type: ignore[arg-type]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._flags.append((host, arrived))

    @property
    def tripped(self) -> bool:
        """Whether the budget had run out `TRIP_LAG` steps ago."""
        if not self._tripped and len(self._flags) > TRIP_LAG:
            flag, arrived = self._flags[0]
            if arrived is not None:
                arrived.synchronize()
            self._tripped = bool(flag)
        return self._tripped
