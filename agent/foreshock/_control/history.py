"""A run's own history of norms: the collector's rule, for decisions that cannot wait for the collector.

The same exponentially weighted mean and absolute deviation of the logarithm, fed with clamped values, as
`foreshock_collector.analysis.detection.Channel` keeps on the host, with the constants of
`foreshock_collector.analysis.rules` (a test compares them; other rules that a collector has for a run do not change
these). On a GPU it takes some sixty kernels on single numbers a step, whatever the model, and no read-back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock._arithmetic.arithmetic import Arithmetic
from foreshock._arithmetic.norms import Flag, Number

ALPHA = 0.97
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


State = tuple[tuple[Number, Number, Number, Number, Number], float | None]
"""Mean, mean absolute deviation, count, spikes in a row, steps of quick learning left; and the learning rate."""


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
        self.state: State = (zero, zero, zero, zero, zero), None

    def compare(self, norm: Number, learning_rate: float) -> Standing:
        """Return how a step's norm compares. Set `state` to its `after` once nothing can fail: ranks learn alike.

        A norm that is not finite, or zero, changes nothing. learning_rate: one that jumps was changed on purpose, and
        the norm may follow it; NaN if unknown.
        """
        a = self._arithmetic
        where, at_least, at_most = a.where, a.at_least, a.at_most
        (mean, deviation, count, spikes, accepting), rate = self.state
        planned, rate = planned_change(rate, learning_rate)
        if planned:
            accepting = at_least(accepting, ACCEPT_STEPS)
        # A planned change is one whatever the norm of that step.
        old = (mean, deviation, count, spikes, accepting)
        x = a.log(norm)
        known = a.finite(x)
        sigma = at_least(SIGMA * deviation, LEAST_SIGMA)
        reach, off = CLAMP * sigma, x - mean
        ready, first = count >= READY_AFTER, count == 0
        spike = ready & (off > SPIKE_Z * sigma) & (off > SPIKE_RISE) & known
        ceiling, far = where(ready, a.exp(mean + reach), math.inf), spike & (off > SKIP_RISE)
        spikes = where(spike, spikes + 1, 0.0)
        lasting = spikes >= ACCEPT_AFTER
        accepting = where(lasting, float(ACCEPT_STEPS), accepting)
        quick = accepting > 0
        learned = where(ready & (accepting <= 0), at_most(at_least(off, -reach), reach), off)
        pace = where(quick, 1 - ACCEPT_ALPHA, at_least(1 / (count + 1), 1 - ALPHA))
        new = (
            where(first, x, mean + pace * learned),
            where(first, FIRST_DEVIATION, deviation + pace * (a.absolute(learned) - deviation)),
            count + 1,
            where(lasting, 0.0, spikes),
            where(first, accepting, at_least(accepting - 1, 0.0)),
        )
        mean, deviation, count, spikes, accepting = (where(known, n, o) for n, o in zip(new, old, strict=True))
        return Standing(ceiling=ceiling, far=far, after=((mean, deviation, count, spikes, accepting), rate))


def planned_change(before: float | None, learning_rate: float) -> tuple[bool, float | None]:
    """Return whether the learning rate was changed on purpose, and the rate to compare the next one with.

    before: that rate of the step before, None if unknown. learning_rate: NaN if unknown.
    """
    if not math.isfinite(learning_rate) or learning_rate <= 0:
        return False, before
    jump = 0.0 if before is None else abs(math.log(learning_rate / before))
    return jump > math.log(PLANNED_RATE_CHANGE), learning_rate
