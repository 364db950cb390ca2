"""A run's own history of norms, on the device: the collector's rule for decisions that cannot wait for it.

The same exponentially weighted mean and absolute deviation of the logarithm, fed with clamped values, as
`foreshock_collector.detection.Channel` keeps on the host, with the constants of `foreshock_collector.rules` (a test
holds them together; a collector that was given other rules for a run does not change these). Some forty kernels on
single numbers a step, whatever the model, and no read-back. A new state replaces the old one in one assignment, so an
error half-way leaves no half-learnt step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
"""A spike this far above the usual is beyond all history: real runs' harmless spikes are 3 to 15 times the usual."""
_SIGMA = 1.2533
"""sqrt(pi / 2) turns a mean absolute deviation into a standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a norm stands against the history before it. Scalars on the device."""

    ceiling: Tensor
    """Float64: the usual norm plus three deviations; Inf before there is enough history."""
    far: Tensor
    """Bool: a spike, and more than thirty times the usual."""


class History:
    """Of one run's global norm."""

    def __init__(self, device: torch.device) -> None:
        # Mean, mean absolute deviation, count, spikes in a row, steps of quick learning left.
        self._state = torch.zeros(5, dtype=torch.float64, device=device)
        self._rate: float | None = None

    def take(self, norm: Tensor, learning_rate: float) -> Standing:
        """Judge a step's norm, then learn it. norm: float64 scalar; one that is not finite, or zero, changes nothing.

        learning_rate: one that jumps was changed on purpose, and the norm may follow it. NaN: not known.
        """
        mean, deviation, count, spikes, accepting = self._state.unbind()
        rate = self._rate
        if math.isfinite(learning_rate) and learning_rate > 0:
            if rate is not None and abs(math.log(learning_rate / rate)) > math.log(PLANNED_RATE_CHANGE):
                accepting = torch.full_like(accepting, ACCEPT_STEPS)
            rate = learning_rate
        x = norm.log()
        sigma = (_SIGMA * deviation).clamp(min=LEAST_SIGMA)
        reach, off = CLAMP * sigma, x - mean
        ready = count >= READY_AFTER
        spike = ready & (off > SPIKE_Z * sigma) & (off > SPIKE_RISE) & x.isfinite()
        standing = Standing(ceiling=torch.where(ready, (mean + reach).exp(), math.inf), far=spike & (off > SKIP_RISE))
        spikes = torch.where(spike, spikes + 1, 0.0)
        lasting = spikes >= ACCEPT_AFTER
        accepting = torch.where(lasting, float(ACCEPT_STEPS), accepting)
        quick = accepting > 0
        learnt = torch.where(ready & ~quick, off.clamp(-reach, reach), off)
        pace = torch.where(quick, 1 - ACCEPT_ALPHA, (1 / (count + 1)).clamp(min=1 - ALPHA))
        first = count == 0
        new = torch.stack(
            (
                torch.where(first, x, mean + pace * learnt),
                torch.where(first, FIRST_DEVIATION, deviation + pace * (learnt.abs() - deviation)),
                count + 1,
                torch.where(lasting, 0.0, spikes),
                torch.where(first, accepting, (accepting - 1).clamp(min=0.0)),
            )
        )
        # A planned change is one whatever the norm of that step.
        old = torch.cat((self._state[:4], accepting.reshape(1))) if rate != self._rate else self._state
        self._state, self._rate = torch.where(x.isfinite(), new, old), rate
        return standing
