"""Decides whether to scale a step's gradient, skip the step, or do nothing; does not act.

Every rank has the same averaged gradient, hence the same norm, history and budget, so all ranks reach the same
decision without communicating.
"""

from __future__ import annotations

from collections import deque

import torch

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number
from foreshock._control.clip import AdaptiveClip, Clip
from foreshock._control.history import History, Standing
from foreshock._step import Step, StepDecision

SKIPS_IN_A_ROW = 3
SKIPS_IN_WINDOW = 5
WINDOW = 100
"""Steps over which skips are counted: a run that needs more of them has a fault that skipping hides."""
TRIP_LAG = 8
"""Steps by which `watch.tripped` lags: the device is further behind only where it limits steps so small that waiting
for one costs nothing."""


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

    def _is_bad(self, step: Step, standing: Standing) -> Flag:
        """Return whether the norm is not finite or far beyond history. A step that a `GradScaler` skips is no fault."""
        assert step.norm is not None
        bad = standing.far | (self._arithmetic.finite(step.norm) ^ True)
        return bad if step.found_inf is None else bad & (step.found_inf == 0)

    @property
    def tripped(self) -> bool:
        """Whether the budget had run out `TRIP_LAG` steps ago: the same answer on every rank at the same step."""
        return self._budget is not None and self._budget.tripped


class Budget:
    """Limits how many steps are skipped."""

    def __init__(self, arithmetic: Arithmetic, device: torch.device) -> None:
        self._arithmetic = arithmetic
        zero = arithmetic.constant(0.0)
        self._newest: deque[Number] = deque([zero] * WINDOW, maxlen=WINDOW)
        """1 for each of the newest steps that was skipped, else 0."""
        # Skips among them; bad steps in a row; 1 once the budget has run out.
        self._state = (zero, zero, zero)
        self._pinned = None
        if device.type == "cuda":
            self._pinned = torch.zeros(TRIP_LAG + 1, dtype=torch.float64, pin_memory=True)
        self._flags: deque[tuple[Number, torch.cuda.Event | None]] = deque(maxlen=TRIP_LAG + 1)
        self._turn = 0
        self._tripped = False

    def grant(self, bad: Flag) -> Flag:
        """Return whether a step that is bad may be skipped."""
        where = self._arithmetic.where
        skipped, in_a_row, spent = self._state
        skipped = skipped - self._newest[0]
        granted = bad & (in_a_row < SKIPS_IN_A_ROW) & (skipped < SKIPS_IN_WINDOW)
        one = self._arithmetic.counted(granted)
        in_a_row, spent = where(bad, in_a_row + 1, 0.0), where(bad ^ granted, 1.0, spent)
        self._copy_to_host(spent)
        self._newest.append(one)
        self._state = (skipped + one, in_a_row, spent)
        return granted

    def _copy_to_host(self, spent: Number) -> None:
        if self._pinned is None:
            self._flags.append((spent, None))
            return
        host = self._pinned[self._turn % (TRIP_LAG + 1)]
        self._turn += 1
        host.copy_(spent, non_blocking=True)  # type: ignore[arg-type]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._flags.append((host, arrived))

    @property
    def tripped(self) -> bool:
        """Whether it had run out `TRIP_LAG` steps ago.

        If each rank read the newest flag that has arrived, answers would differ and one rank would stop alone. So it is
        always the flag of that step, and it is waited for if it has not arrived.
        """
        if not self._tripped and len(self._flags) > TRIP_LAG:
            flag, arrived = self._flags[0]
            if arrived is not None:
                arrived.synchronize()
            self._tripped = bool(flag)
        return self._tripped
