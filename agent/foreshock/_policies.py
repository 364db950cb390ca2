"""Decides whether to scale a step's gradient, skip the step, or do nothing; does not act.

Every rank has the same averaged gradient, hence the same norm, history and budget, so all ranks reach the same
decision without communicating.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock._clip import AdaptiveClip, Clip
from foreshock._history import History, Standing
from foreshock._numbers import Flag, Number, constant, counted, finite, where

SKIPS_IN_A_ROW = 3
SKIPS_IN_WINDOW = 5
WINDOW = 100
"""A run that would have to leave out more steps than these, of the last hundred, has a fault that skipping hides."""
TRIP_LAG = 8
"""Steps by which `watch.tripped` is late: the device is further behind than that only where it is the bottleneck of
steps so small that waiting for one costs nothing."""


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """On one step."""

    divisor: Number | None = None
    """At least 1: of the whole gradient. None: it is not scaled."""
    skip: Flag | None = None
    """Leave the step out. None: never."""


class Policies:
    """Those of one rank."""

    def __init__(self, *, clip: Clip | None, skip: bool, device: torch.device) -> None:
        self._clip = clip
        self._history = History(device) if skip or isinstance(clip, AdaptiveClip) else None
        self._budget = Budget(device) if skip else None

    def rule(self, norm: Number, *, learning_rate: float, left_out: Number | None) -> Ruling:
        """norm: of the averaged gradient, unscaled.

        left_out: not zero where a GradScaler leaves this step out by itself, which is no fault.
        """
        standing = None if self._history is None else self._history.judge(norm, learning_rate)
        divisor = None
        if self._clip is not None:
            divisor = self._clip.divisor(norm, None if standing is None else standing.ceiling)
        skip = self._skip(norm, standing, left_out)
        # Last, so that a step that has to be ruled anew after an error is learned once.
        if self._history is not None and standing is not None:
            self._history.state = standing.after
        return Ruling(divisor=divisor, skip=skip)

    def _skip(self, norm: Number, standing: Standing | None, left_out: Number | None) -> Flag | None:
        if self._budget is None or standing is None:
            return None
        # Not finite, or far beyond history.
        bad = standing.far | (finite(norm) ^ True)
        return self._budget.grant(bad if left_out is None else bad & (left_out == 0))

    @property
    def tripped(self) -> bool:
        """The budget has run out, some steps ago: the same answer on every rank at the same step."""
        return self._budget is not None and self._budget.tripped


class Budget:
    """How many steps may be left out."""

    def __init__(self, device: torch.device) -> None:
        zero = constant(0.0, device)
        self._newest: deque[Number] = deque([zero] * WINDOW, maxlen=WINDOW)
        """1 for each of the newest steps that was left out, else 0."""
        # How many of them were; bad steps in a row; 1 once the budget has run out.
        self._state = (zero, zero, zero)
        self._pinned = None
        if device.type == "cuda":
            self._pinned = torch.zeros(TRIP_LAG + 1, dtype=torch.float64, pin_memory=True)
        self._flags: deque[tuple[Number, torch.cuda.Event | None]] = deque(maxlen=TRIP_LAG + 1)
        self._turn = 0
        self._tripped = False

    def grant(self, bad: Flag) -> Flag:
        """Whether a step that is bad may be left out."""
        left_out, in_a_row, spent = self._state
        left_out = left_out - self._newest[0]
        granted = bad & (in_a_row < SKIPS_IN_A_ROW) & (left_out < SKIPS_IN_WINDOW)
        one = counted(granted)
        in_a_row, spent = where(bad, in_a_row + 1, 0.0), where(bad ^ granted, 1.0, spent)
        self._hand_over(spent)
        self._newest.append(one)
        self._state = (left_out + one, in_a_row, spent)
        return granted

    def _hand_over(self, spent: Number) -> None:
        if self._pinned is None or not isinstance(spent, Tensor):
            self._flags.append((spent, None))
            return
        host = self._pinned[self._turn % (TRIP_LAG + 1)]
        self._turn += 1
        host.copy_(spent, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._flags.append((host, arrived))

    @property
    def tripped(self) -> bool:
        """As of `TRIP_LAG` steps ago. Ranks that asked for the newest that has arrived would hear different answers,
        and one of them would stop alone: so it is always that step, and it is waited for if it is not there yet.
        """
        if not self._tripped and len(self._flags) > TRIP_LAG:
            flag, arrived = self._flags[0]
            if arrived is not None:
                arrived.synchronize()
            self._tripped = bool(flag)
        return self._tripped
