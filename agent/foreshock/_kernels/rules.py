"""The rules of history, budget and clipping in Triton's language, with the constants of those on the host.

They take single numbers and blocks of them alike, float64 throughout. A constant stands behind a number, never before
it, and never in `tl.maximum`, which would take it for a float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock._control import clip, decide, history

_INF = tl.constexpr(float("inf"))
_ACCEPT_STEPS = tl.constexpr(history.ACCEPT_STEPS)
_ACCEPT_AFTER = tl.constexpr(history.ACCEPT_AFTER)
_ACCEPT_PACE = tl.constexpr(1 - history.ACCEPT_ALPHA)
_CLAMP = tl.constexpr(history.CLAMP)
_FIRST_DEVIATION = tl.constexpr(history.FIRST_DEVIATION)
_LEAST_SIGMA = tl.constexpr(history.LEAST_SIGMA)
_PACE = tl.constexpr(1 - history.ALPHA)
_RECENT_PACE = tl.constexpr(1 - history.RECENT_ALPHA)
_READY_AFTER = tl.constexpr(history.READY_AFTER)
_SIGMA = tl.constexpr(history.SIGMA)
_SKIP_RISE = tl.constexpr(history.SKIP_RISE)
_SPIKE_RISE = tl.constexpr(history.SPIKE_RISE)
_SPIKE_Z = tl.constexpr(history.SPIKE_Z)
_SKIPS_IN_A_ROW = tl.constexpr(decide.SKIPS_IN_A_ROW)
_SKIPS_IN_WINDOW = tl.constexpr(decide.SKIPS_IN_WINDOW)
_EPSILON = tl.constexpr(clip.EPSILON)


@triton.jit
def update_history(norm, planned, mean, recent, deviation, count, spikes, accepting):
    """`History.compare` with the learning rate's jump as a flag: ceiling, far, and the six numbers that come after."""
    accepting = tl.where(planned & (accepting < _ACCEPT_STEPS), _ACCEPT_STEPS, accepting)
    x = tl.log(norm)
    known = tl.abs(x) < _INF
    usual = tl.minimum(mean, recent)
    # Not tl.maximum, here and below: it takes a constant for a float32.
    spread = deviation * _SIGMA
    sigma = tl.where(spread < _LEAST_SIGMA, _LEAST_SIGMA, spread)
    reach = sigma * _CLAMP
    off = x - usual
    ready = count >= _READY_AFTER
    first = count == 0
    spike = ready & (off > sigma * _SPIKE_Z) & (off > _SPIKE_RISE) & known
    ceiling = tl.where(ready, tl.exp(usual + reach), _INF)
    far = spike & (off > _SKIP_RISE)
    row = tl.where(spike, spikes + 1, 0.0)
    lasting = row >= _ACCEPT_AFTER
    left = tl.where(lasting, _ACCEPT_STEPS, accepting)
    clamped = ready & (left <= 0)
    learned = usual + tl.where(clamped, tl.minimum(tl.maximum(off, -reach), reach), off)
    apart = tl.abs(learned - recent)
    apart = tl.where(clamped, tl.minimum(apart, reach), apart)
    even = 1 / (count + 1)
    pace = tl.where(left > 0, _ACCEPT_PACE, tl.where(even < _PACE, _PACE, even))
    share = tl.where(left > 0, _ACCEPT_PACE, even)
    recent_pace = tl.where(share < _RECENT_PACE, _RECENT_PACE, share)
    next_mean = tl.where(first, x, mean + pace * (learned - mean))
    next_recent = tl.where(first, x, recent + recent_pace * (learned - recent))
    next_deviation = tl.where(first, _FIRST_DEVIATION, deviation + pace * (apart - deviation))
    next_left = tl.where(first, left, tl.maximum(left - 1, 0.0))
    return (
        ceiling,
        far,
        tl.where(known, next_mean, mean),
        tl.where(known, next_recent, recent),
        tl.where(known, next_deviation, deviation),
        tl.where(known, count + 1, count),
        tl.where(known, tl.where(lasting, 0.0, row), spikes),
        tl.where(known, next_left, accepting),
    )


@triton.jit
def grant_skip(bad, oldest, skipped, in_a_row, spent):
    """`Budget.grant`: whether a bad step may be skipped, and the three numbers that come after.

    oldest: 1 if the step that leaves the window was skipped, else 0.
    """
    skipped = skipped - oldest
    granted = bad & (in_a_row < _SKIPS_IN_A_ROW) & (skipped < _SKIPS_IN_WINDOW)
    return (
        granted,
        skipped + granted.to(tl.float64),
        tl.where(bad, in_a_row + 1, 0.0),
        tl.where(bad ^ granted, 1.0, spent),
    )


@triton.jit
def clip_divisor(norm, limit):
    """What a gradient of this norm is divided by, at least 1."""
    return tl.where(tl.abs(norm) < _INF, tl.maximum((norm + _EPSILON) / limit, 1.0), 1.0)
