"""The history of norms of the attempt that this one continues, as the collector knows it.

A script that resumes from a checkpoint without `watch.state_dict()` gets it at attach, before its first step. Rank 0
asks, waits a few seconds at most, and posts the answer for all ranks to agree on. So all begin with one history, or
with none, whatever comes late on one of them, and no step waits for anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._attach.settings import Settings
from foreshock._control.clip import AdaptiveClip
from foreshock._control.history import Rates, loaded, saved
from foreshock._errors import SettingsError
from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import NormHistory
from foreshock_recorder.ring import Ring

CAPABILITY = "norm_history"
"""What a rank asks the collector for."""


def wants_history(settings: Settings, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this rank decides by a history, and resumes a training that may have made one.

    A new training would be clipped and skipped by the norms of an old one: early norms are the largest. Of a training
    that resumes, the optimizer holds moments already; one without any (SGD without momentum) does not show it.
    """
    keeps = settings.skip or isinstance(settings.clip, AdaptiveClip)
    return keeps and any(map(_of_a_step, optimizer.state.values()))


def _of_a_step(state: Any) -> bool:
    """Return whether a parameter's state is more than what Adagrad makes before the first step."""
    if not isinstance(state, Mapping) or not state:
        return False
    try:
        return float(state.get("step", 1)) > 0
    except (TypeError, ValueError, RuntimeError):
        # Others than torch's own may call anything so.
        return True


def inherited_history(ring: Ring, recorder: RecorderProcess, arithmetic: Arithmetic) -> dict[str, float | None]:
    """Return what `Watch.load_state_dict` takes; empty if the collector knows nothing, or does not answer in time."""
    try:
        found = recorder.wait_for_history(ring)
        if found is None or not found.steps:
            return {}
        values = state_dict_of(found)
        loaded(values, arithmetic)
    except (OSError, SettingsError):
        # The other ranks wait for this one.
        return {}
    return values


def state_dict_of(history: NormHistory) -> dict[str, float | None]:
    """Return a collector's history as `Watch.load_state_dict` takes it: nothing has happened in it yet."""
    numbers = (history.mean, history.recent, history.deviation, history.steps, 0.0, 0.0)
    return saved((numbers, Rates(newest=history.learning_rate if history.learning_rate > 0 else None)))
