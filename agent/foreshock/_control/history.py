"""A run's own history of norms: the collector's rule, for decisions that cannot wait for the collector.

The same exponentially weighted means and absolute deviation of the logarithm, fed with clamped values, as
`foreshock_collector.analysis.channel.ChannelState` keeps on the host, with the constants of
`foreshock_collector.analysis.rules` (a test compares them; other rules that a collector has for a run do not change
these). On a GPU it takes some sixty kernels on single numbers a step, whatever the model, and no read-back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number
from foreshock._errors import SettingsError

ALPHA = 0.97
RECENT_ALPHA = 0.85
READY_AFTER = 25
LEAST_SIGMA = 0.10
SPIKE_Z = 6.0
SPIKE_RISE = math.log(3.0)
CLAMP = 3.0
FIRST_DEVIATION = 0.25
ACCEPT_AFTER = 10
ACCEPT_ALPHA = 0.8
ACCEPT_STEPS = 20
PLANNED_RATE_CHANGE = 1.5
SKIP_RISE = math.log(30.0)
"""Rise of a spike beyond all history, in logarithms: harmless spikes of real runs are 3 to 15 times the usual norm."""
SIGMA = 1.2533
"""sqrt(pi / 2) turns a mean absolute deviation into a standard deviation."""


class Rates(NamedTuple):
    """Holds what is remembered of the learning rate."""

    newest: float | None = None
    """None if unknown."""
    changing: int = 0
    """Steps for which another jump belongs to the last one."""


State = tuple[tuple[Number, Number, Number, Number, Number, Number], Rates]
"""Slow and quick mean, mean absolute deviation, count, spikes in a row, steps of quick learning left; and the learning
rate."""


_NUMBERS = ("mean", "recent", "deviation", "count", "spikes", "accepting")
"""Names of the numbers of a state, in order."""


def saved(state: State) -> dict[str, float | None]:
    """Return a state as plain numbers by name. Waits for the device."""
    numbers, rates = state
    return dict(zip(_NUMBERS, map(float, numbers), strict=True)) | {
        "learning_rate": rates.newest,
        "changing": rates.changing,
    }


def loaded(values: Mapping[str, Any], arithmetic: Arithmetic) -> State:
    """Return the state of which `saved` returned these values. Raises `SettingsError`."""
    try:
        numbers = [float(values[name]) for name in _NUMBERS]
        rate = values["learning_rate"]
        rates = Rates(None if rate is None else float(rate), int(values["changing"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"load_state_dict: this is not what state_dict returned: {error!r}") from None
    if not all(map(math.isfinite, numbers)):
        raise SettingsError("load_state_dict: the history contains numbers that are not finite")
    mean, recent, deviation, count, spikes, accepting = map(arithmetic.constant, numbers)
    return (mean, recent, deviation, count, spikes, accepting), rates


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Compares a norm with the history before it."""

    ceiling: Number
    """The usual norm plus three deviations; Inf before there is enough history."""
    far: Flag
    """A spike, and more than thirty times the usual."""
    after: State
    """The history after this norm."""


class History:
    """Tracks the global norm of one run."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        zero = arithmetic.constant(0.0)
        self.state: State = (zero,) * 6, Rates()

    def compare(self, norm: Number, learning_rate: float) -> Standing:
        """Return how a step's norm compares. Set `state` to its `after` once nothing can fail: ranks learn alike.

        A norm that is not finite, or zero, changes nothing. learning_rate: one that jumps was changed on purpose, and
        the norm may follow it; NaN if unknown.
        """
        a = self._arithmetic
        where, at_least, at_most = a.where, a.at_least, a.at_most
        (mean, recent, deviation, count, spikes, accepting), rates = self.state
        planned, rates = planned_change(rates, learning_rate)
        if planned:
            accepting = at_least(accepting, ACCEPT_STEPS)
        # A planned change is one whatever the norm of that step.
        old = (mean, recent, deviation, count, spikes, accepting)
        x = a.log(norm)
        known = a.finite(x)
        usual = at_most(mean, recent)
        sigma = at_least(SIGMA * deviation, LEAST_SIGMA)
        reach, off = CLAMP * sigma, x - usual
        ready, first = count >= READY_AFTER, count == 0
        spike = ready & (off > SPIKE_Z * sigma) & (off > SPIKE_RISE) & known
        ceiling, far = where(ready, a.exp(usual + reach), math.inf), spike & (off > SKIP_RISE)
        spikes = where(spike, spikes + 1, 0.0)
        lasting = spikes >= ACCEPT_AFTER
        accepting = where(lasting, float(ACCEPT_STEPS), accepting)
        quick = accepting > 0
        clamped = ready & (accepting <= 0)
        learned = usual + where(clamped, at_most(at_least(off, -reach), reach), off)
        apart = a.absolute(learned - recent)
        apart = where(clamped, at_most(apart, reach), apart)
        even = 1 / (count + 1)
        pace = where(quick, 1 - ACCEPT_ALPHA, at_least(even, 1 - ALPHA))
        recent_pace = at_least(where(quick, 1 - ACCEPT_ALPHA, even), 1 - RECENT_ALPHA)
        new = (
            where(first, x, mean + pace * (learned - mean)),
            where(first, x, recent + recent_pace * (learned - recent)),
            where(first, FIRST_DEVIATION, deviation + pace * (apart - deviation)),
            count + 1,
            where(lasting, 0.0, spikes),
            where(first, accepting, at_least(accepting - 1, 0.0)),
        )
        mean, recent, deviation, count, spikes, accepting = (where(known, n, o) for n, o in zip(new, old, strict=True))
        return Standing(ceiling=ceiling, far=far, after=((mean, recent, deviation, count, spikes, accepting), rates))


def planned_change(before: Rates, learning_rate: float) -> tuple[bool, Rates]:
    """Return whether the learning rate was changed on purpose, and what to remember of it.

    A rate that jumps again right after a change has run away: the norm has one change to follow, not one at each step.
    learning_rate: NaN if unknown.
    """
    newest, changing = before.newest, max(0, before.changing - 1)
    if not math.isfinite(learning_rate) or learning_rate <= 0:
        return False, Rates(newest, changing)
    jumps = newest is not None and abs(math.log(learning_rate / newest)) > math.log(PLANNED_RATE_CHANGE)
    return jumps and not changing, Rates(learning_rate, ACCEPT_STEPS if jumps else changing)
