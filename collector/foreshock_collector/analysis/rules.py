"""Every constant of detection and diagnosis, in one place. docs/detection.md says how they were chosen.

A run may have its own: `[runs."NAME"]` in the collector's configuration, `--set` of `foreshock diagnose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any


def _within(least: float, most: float, default: float) -> Any:
    """A number from `least` to `most`; one beyond would stop detection, or make it meaningless."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass(frozen=True, kw_only=True)
class ChannelRules:
    """How one quantity is judged against its own history."""

    logarithmic: bool = True
    """Evaluator the logarithm of a positive quantity; else the plain value, in proportion to its mean."""
    alpha: float = _within(0, 0.9999, 0.97)
    """Weight of the past in the running mean: a half-life of 23 steps (ZClip's)."""
    ready_after: int = _within(1, 1e6, 25)
    """Steps of history before a step is judged by its deviation (ZClip's). Until then only a surge is noticed."""
    least_sigma: float = _within(1e-6, 1e3, 0.10)
    """Floor of the deviation: a calm run must not call a 6 % move six sigma."""
    spike_z: float = _within(0, 1e9, 6.0)
    """Deviations above the mean that make a spike (OLMo-core's)..."""
    spike_rise: float = _within(0, 700, math.log(3.0))
    """... if it is also this far above: three times the usual norm."""
    high_rise: float = _within(0, 700, math.log(2.0))
    """A step this far above the usual is high. Only such steps add to the sum: a norm that drifts is no build-up."""
    cusum_slack: float = _within(0, 1e9, 1.0)
    """What each step takes off the sum, high or not."""
    cusum_cap: float = _within(0, 1e9, 6.0)
    """Most that a step's z adds to it: a lone spike adds 5."""
    cusum_limit: float = _within(0, 1e9, 8.0)
    """A sum that makes a build-up, if the step is the highest since the sum was zero, and steep..."""
    steep_rise: float = _within(0, 700, math.log(10.0))
    """... that is, so far above the usual. A norm that comes down again from a spike does not climb..."""
    lasting_limit: float = _within(0, 1e9, 15.0)
    """... nor need it, at a sum that takes three spikes in a row."""
    surge_steps: int = _within(1, 1000, 3)
    """Spikes' rises in a row that make a build-up whatever the deviation, if the last is steep or half the highest."""
    clamp: float = _within(0.01, 1e6, 3.0)
    """Deviations to which values are clamped before they become history."""
    first_deviation: float = _within(0, 1e6, 0.25)
    """Mean absolute deviation that is assumed of the first value."""
    accept_after: int = _within(1, 1e6, 10)
    """Spikes in a row after which the new level is accepted..."""
    accept_alpha: float = _within(0, 0.9999, 0.8)
    """... by forgetting faster: the weight of the past meanwhile..."""
    accept_steps: int = _within(0, 1e6, 20)
    """... for this many steps. So it is after a planned change."""
    quiet_steps: int = _within(1, 1e6, 10)
    """Steps in a row with a sum of zero that end a build-up."""


@dataclass(frozen=True, kw_only=True)
class FaultRules:
    """When a trouble that lasts is one, though every number is finite."""

    begins_after: int = _within(1, 1e6, 20)
    """Steps in a row that must show it..."""
    ends_after: int = _within(1, 1e6, 20)
    """... and that must not, before it is over."""
    agreement: float = _within(0, 1, 0.998)
    """Ranks that agree so well see the same data: |mean gradient|^2 over the mean of |local gradient|^2..."""
    spread: float = _within(0, 1, 2e-3)
    """... and their local norms differ by no more than this part of the largest."""
    outlier: float = _within(1, 1e9, 10.0)
    """A rank whose local norm is this many times the median of the others', step after step, is not like them."""
    vanished: float = _within(0, 1, 1e-5)
    """A layer whose norm is this part of the largest layer's learns nothing..."""
    vanishing_steps: int = _within(1, 1e6, 100)
    """... if it is so for this many steps in a row."""
    faded: float = _within(0, 1, 1e-4)
    """So does a model whose norm is this part of that of its first steps, while its loss..."""
    unlearned: float = _within(0, 1e3, 0.5)
    """... is still this part of the loss of its first steps."""
    divergence: float = _within(0, 1e9, 1.0)
    """A loss that stands above its best by this part of it..."""
    divergence_steps: int = _within(1, 1e6, 100)
    """... for this many steps in a row..."""
    divergence_rise: float = _within(0, 1e9, 0.05)
    """... and has risen by this part over them, diverges."""
    lost_seconds: float = _within(0, 1e6, 3.0)
    """A rank that dies without a goodbye may have died of another's error: that long is waited for one."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All of them, for one run."""

    gradient: ChannelRules = field(default_factory=ChannelRules)
    """The global gradient norm, before clipping: positive, and judged by its logarithm."""
    loss: ChannelRules = field(
        default_factory=lambda: ChannelRules(logarithmic=False, least_sigma=0.005, spike_rise=0.1)
    )
    """A loss may be zero or negative and moves little: 0.5 % of it is the least deviation, 10 % the least spike."""
    faults: FaultRules = field(default_factory=FaultRules)
    """Troubles that last, though every number is finite."""
    planned_rate_change: float = _within(1, 1e9, 1.5)
    """A learning rate that changes by this factor from one step to the next was changed on purpose."""
    interval_change: float = _within(1, 1e9, 3.0)
    """Records this many times further apart than before, or closer, are another series: history starts anew."""
    collapse_after: int = _within(1, 1e6, 10)
    """Overflows of a loss scale in a row that are no calibration any more; so is one below a scale of 1."""
    recovered_after: int = _within(1, 1e6, 50)
    """Finite steps in a row that end a failure."""
    lead_steps: int = _within(1, 2000, 32)
    """How many steps before the first non-finite one a spike or build-up still belongs to it."""
    sparse_steps: int = _within(1, 1e6, 50)
    """Records so far apart cannot show a climb of 3 to 8 steps."""

    def with_overrides(self, values: Mapping[str, Any]) -> Rules:
        """Some of them changed, by name: {"recovered_after": 100, "gradient": {"spike_z": 8}}. Raises `ValueError`."""
        changed: Rules = _changed(self, values, "")
        return changed


DEFAULT = Rules()


def _changed(group: Any, values: Mapping[str, Any], path: str) -> Any:
    known = {f.name: f for f in fields(group)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown rule {path}{name}; known are {', '.join(path + k for k in known)}")
        if is_dataclass(now := getattr(group, name)):
            if not isinstance(value, Mapping):
                raise ValueError(f"rule {path}{name} is a group: give one of its members")
            changes[name] = _changed(now, value, f"{path}{name}.")
        else:
            changes[name] = _checked(f"{path}{name}", type(now), value, known[name].metadata.get("range"))
    return replace(group, **changes)


def _checked(name: str, kind: type, value: Any, within: tuple[float, float] | None) -> bool | int | float:
    if within is None:
        if not isinstance(value, bool):
            raise ValueError(f"rule {name} must be true or false, not {value!r}")
        return value
    least, most = within
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A NaN lies in no range, and an infinite number is no whole one.
    if not number or not least <= value <= most or (kind is int and value != int(value)):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"rule {name} must be {wanted} from {least:g} to {most:g}, not {value!r}")
    return float(value) if kind is float else int(value)
