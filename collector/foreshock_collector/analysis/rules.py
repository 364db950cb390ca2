"""Every constant of detection and diagnosis, in one place. docs/detection.md says how they were chosen.

A run may have its own: `[runs."NAME"]` in the collector's configuration, `--set` of `foreshock diagnose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from foreshock_collector.settings import range_of, setting


@dataclass(frozen=True, kw_only=True)
class ChannelRules:
    """Rules for evaluating one quantity, such as the gradient norm, against its own history."""

    logarithmic: bool = setting(
        True,
        "Whether to evaluate the logarithm of a positive quantity, or the plain value relative to its mean.",
    )
    alpha: float = setting(
        0.97,
        "Weight of the past in the running mean: 0.97 is a half-life of 23 steps (ZClip's).",
        least=0,
        most=0.9999,
    )
    recent_alpha: float = setting(
        0.85,
        "Weight of the past in the quick mean, a half-life of 4 steps. The lower of the two means is the usual value, "
        "so that a fall is followed at once.",
        least=0,
        most=0.9999,
    )
    ready_after: int = setting(
        25,
        "Steps of history before the deviation is used (ZClip's); until then only a surge is noticed.",
        least=1,
        most=1e6,
    )
    least_sigma: float = setting(
        0.10,
        "Floor of the deviation: a calm run must not call a 6 % move six sigma.",
        least=1e-6,
        most=1e3,
    )
    spike_z: float = setting(
        6.0,
        "Deviations above the mean that make a spike (OLMo-core's), if spike_rise is exceeded as well.",
        least=0,
        most=1e9,
    )
    spike_rise: float = setting(
        math.log(3.0),
        "Least rise of a spike above the mean: three times the usual norm.",
        least=0,
        most=700,
    )
    high_rise: float = setting(
        math.log(2.0),
        "Rise above the mean from which a step adds to the sum: a norm that drifts is no build-up.",
        least=0,
        most=700,
    )
    cusum_slack: float = setting(
        1.0,
        "What each step takes off the sum, whatever its rise.",
        least=0,
        most=1e9,
    )
    cusum_cap: float = setting(
        6.0,
        "Most that the z of one step adds to the sum: a lone spike adds 5.",
        least=0,
        most=1e9,
    )
    cusum_limit: float = setting(
        8.0,
        "Sum that makes a build-up on a steep step that climbs further.",
        least=0,
        most=1e9,
    )
    steep_rise: float = setting(
        math.log(10.0),
        "Rise from which a step is steep.",
        least=0,
        most=700,
    )
    climb_rise: float = setting(
        math.log(1.5),
        "Least rise of a steep step above the highest since the sum was zero: a norm that stays high or falls again "
        "after a spike does not climb.",
        least=0,
        most=700,
    )
    lasting_limit: float = setting(
        15.0,
        "Sum that makes a build-up without a steep step: it takes three spikes in a row.",
        least=0,
        most=1e9,
    )
    surge_steps: int = setting(
        3,
        "Rises of a spike in a row that make a build-up at any deviation, on a steep step that climbs further.",
        least=1,
        most=1000,
    )
    clamp: float = setting(
        3.0,
        "Deviations to which values are clamped before they become history.",
        least=0.01,
        most=1e6,
    )
    first_deviation: float = setting(
        0.25,
        "Mean absolute deviation assumed for the first value.",
        least=0,
        most=1e6,
    )
    accept_after: int = setting(
        10,
        "Spikes in a row after which the new level is accepted.",
        least=1,
        most=1e6,
    )
    accept_alpha: float = setting(
        0.8,
        "Weight of the past while a new level is accepted: history is forgotten faster.",
        least=0,
        most=0.9999,
    )
    accept_steps: int = setting(
        20,
        "Steps for which accept_alpha holds, also after a planned change of the learning rate.",
        least=0,
        most=1e6,
    )
    quiet_steps: int = setting(
        10,
        "Steps in a row with a sum of zero that end a build-up.",
        least=1,
        most=1e6,
    )

    @cached_property
    def steady_after(self) -> int:
        """Steps after which the means have their final weights and deviations are used."""
        return max(self.ready_after, *(math.ceil(1 / (1 - alpha)) for alpha in (self.alpha, self.recent_alpha)))


@dataclass(frozen=True, kw_only=True)
class FaultRules:
    """Rules for faults that last although every number is finite."""

    begins_after: int = setting(
        20,
        "Steps in a row that must show a fault before it is reported.",
        least=1,
        most=1e6,
    )
    ends_after: int = setting(
        20,
        "Steps in a row without the fault before it is over.",
        least=1,
        most=1e6,
    )
    agreement: float = setting(
        0.998,
        "Agreement of ranks that see the same data: |mean gradient|^2 over the mean of |local gradient|^2.",
        least=0,
        most=1,
    )
    spread: float = setting(
        2e-3,
        "Largest difference of local norms, relative to the largest, with which ranks see the same data.",
        least=0,
        most=1,
    )
    outlier: float = setting(
        10.0,
        "Multiple of the median of the other ranks' local norms that makes a rank an outlier, step after step.",
        least=1,
        most=1e9,
    )
    vanished: float = setting(
        1e-5,
        "Norm of a layer, relative to the largest layer's, below which it learns nothing.",
        least=0,
        most=1,
    )
    vanishing_steps: int = setting(
        100,
        "Steps in a row for which a layer or the model must learn nothing.",
        least=1,
        most=1e6,
    )
    faded: float = setting(
        1e-4,
        "Norm of the model, relative to its first steps, below which it learns nothing, if unlearned holds as well.",
        least=0,
        most=1,
    )
    unlearned: float = setting(
        0.5,
        "Loss, relative to the first steps, above which a faded model has not learned.",
        least=0,
        most=1e3,
    )
    divergence: float = setting(
        1.0,
        "Rise of the loss above its best, relative to its best, that is divergence.",
        least=0,
        most=1e9,
    )
    divergence_steps: int = setting(
        100,
        "Steps in a row for which the loss must stay above its best.",
        least=1,
        most=1e6,
    )
    divergence_rise: float = setting(
        0.05,
        "Rise of the loss over divergence_steps, relative to it, without which it does not diverge.",
        least=0,
        most=1e9,
    )
    climb: float = setting(
        0.5,
        "Rise of the loss above its best, relative to its best, that is divergence if the loss climbs steadily.",
        least=0,
        most=1e9,
    )
    climb_steps: int = setting(
        24,
        "Steps that must rise further for a steady climb; each that does not takes three of them back.",
        least=1,
        most=1e6,
    )
    untrained: float = setting(
        4.0,
        "Multiple of the first losses beyond which a loss must have fallen before: one that only grows from next to "
        "nothing is a penalty, not an error.",
        least=1,
        most=1e9,
    )
    lost_seconds: float = setting(
        3.0,
        "Seconds to wait after a rank died without reporting why: another rank's error may be the cause.",
        least=0,
        most=1e6,
    )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Holds the rules of detection and diagnosis for one run."""

    gradient: ChannelRules = field(default_factory=ChannelRules)
    """The global gradient norm, before clipping: positive, and evaluated by its logarithm."""
    loss: ChannelRules = field(
        default_factory=lambda: ChannelRules(logarithmic=False, recent_alpha=0.97, least_sigma=0.005, spike_rise=0.1)
    )
    """The loss. It may be zero or negative and moves little: 0.5 % is the least deviation, 10 % the least spike. It
    falls slowly and has outliers, so one mean is enough."""
    faults: FaultRules = field(default_factory=FaultRules)
    planned_rate_change: float = setting(
        1.5,
        "Factor between two steps' learning rates from which the change was made on purpose.",
        least=1,
        most=1e9,
    )
    interval_change: float = setting(
        3.0,
        "Factor by which the distance of records must change to make another series, whose history starts over.",
        least=1,
        most=1e9,
    )
    collapse_after: int = setting(
        10,
        "Overflows of a loss scale in a row that are a collapse; at a scale below 1 a single one is.",
        least=1,
        most=1e6,
    )
    search_steps: int = setting(
        32,
        "Overflows in a row before the first finite step that are no collapse: a scaler comes down from 2^32 to 1.",
        least=1,
        most=1e6,
    )
    recovered_after: int = setting(
        50,
        "Finite steps in a row that end a failure.",
        least=1,
        most=1e6,
    )
    lead_steps: int = setting(
        32,
        "Steps before the first non-finite one within which a spike or build-up belongs to it.",
        least=1,
        most=2000,
    )
    sparse_steps: int = setting(
        50,
        "Distance of records from which they cannot show a climb of 3 to 8 steps.",
        least=1,
        most=1e6,
    )

    def with_overrides(self, values: Mapping[str, Any]) -> Rules:
        """Return rules with some values replaced, such as {"recovered_after": 100, "gradient": {"spike_z": 8}}.

        Raises `ValueError` if a name is unknown or a value out of range.
        """
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
            changes[name] = _checked(f"{path}{name}", type(now), value, range_of(known[name]))
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
