"""Trends, lone spikes and runaway learning rates: what the norm's history makes of them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.rules import DEFAULT


def trace(norms: list[float], rates: list[float] | None = None) -> tuple[list[Event], Detector]:
    """Norms, and learning rates of a run that observes no loss."""
    detector, events = Detector(), list[Event]()
    for step, norm in enumerate(norms):
        where: dict[str, Any] = {"attempt": 0, "sequence": step + 1, "step": step}
        rate = math.nan if rates is None else rates[step]
        events += detector.update(norm=norm, loss=None, rate=rate, nonfinite=not math.isfinite(norm), **where)
    return events, detector


def noisy(levels: list[float], deviation: float = 0.1, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level * math.exp(rng.gauss(0, deviation)) for level in levels]


def steps_of(kind: str, events: list[Event]) -> list[int]:
    return [event.step for event in events if event.kind == kind]


FALL = [1.0] * 25 + [0.01 ** (i / 50) for i in range(50)] + [0.01] * 25
"""A norm that falls a hundredfold within 50 steps, as in a young run, and then stays."""


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("calm", [0, 10, 25])
def test_a_climb_after_a_norm_has_fallen_is_a_build_up_before_the_nan(seed: int, calm: int) -> None:
    fallen = noisy(FALL[: 75 + calm], seed=seed)
    events, _ = trace([*fallen, 0.05, 0.3, 2.0, 9.0, math.nan])
    (build_up,) = steps_of("build_up", events)
    assert len(fallen) < build_up <= len(fallen) + 2
    assert steps_of("spike", events)


@pytest.mark.parametrize("seed", range(10))
def test_the_band_around_a_norm_that_has_fallen_is_narrow(seed: int) -> None:
    _, detector = trace(noisy(FALL, seed=seed))
    band = detector.gradient.band(DEFAULT.gradient)
    assert band is not None
    low, high = band
    assert 0.001 < low < 0.01 < high < 0.1


@pytest.mark.parametrize("height", [10.0, 1e3, 1e9])
def test_a_lone_spike_does_not_widen_the_band(height: float) -> None:
    calm = noisy([1.0] * 200)
    _, before = trace(calm)
    events, after = trace([*calm, height])
    (narrow, wide) = (state.gradient.band(DEFAULT.gradient) for state in (before, after))
    assert narrow is not None and wide is not None
    assert steps_of("spike", events) == [200] and not steps_of("build_up", events)
    assert math.log(wide[1] / wide[0]) < 1.15 * math.log(narrow[1] / narrow[0])


def test_a_learning_rate_that_runs_away_is_no_planned_change() -> None:
    climb = [(0.001 * 1.6**i, 4.0**i) for i in range(1, 8)]
    rates = [0.001] * 200 + [rate for rate, _ in climb] + [1.0]
    events, _ = trace([*noisy([1.0] * 200), *(norm for _, norm in climb), math.nan], rates)
    (build_up,) = steps_of("build_up", events)
    assert build_up == 202


def test_two_equally_hard_batches_in_a_row_are_no_build_up_but_a_rise_from_one_to_the_next_is() -> None:
    calm = noisy([1.0] * 100)
    assert not steps_of("build_up", trace([*calm, 30.0, 40.0, *calm])[0])
    assert steps_of("build_up", trace([*calm, 30.0, 60.0])[0]) == [101]


@pytest.mark.parametrize("seed", range(10))
def test_a_norm_that_returns_from_easy_batches_does_not_climb(seed: int) -> None:
    levels = [0.3 if step % 60 < 8 else 1.0 for step in range(600)]
    assert not steps_of("build_up", trace(noisy(levels, 0.3, seed))[0])
