"""The noise scale finds the signal and the noise that were put in, and does not answer where it cannot know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foreshock_collector.analysis.noise import NoiseScale
from foreshock_collector.state.encoding import decode, encode


def fed(signal: float, noise: float, *, world: int, steps: int = 4000, size: int = 400) -> NoiseScale:
    """signal: square norm of the true gradient. noise: expected square norm of a rank's own noise."""
    rng = np.random.default_rng(0)
    true = np.full(size, (signal / size) ** 0.5)
    scale = NoiseScale()
    for _ in range(steps):
        local = true + rng.normal(0, (noise / size) ** 0.5, (world, size))
        mean = local.mean(axis=0)
        square = float(mean @ mean)
        scale.update(square / float((local**2).sum(axis=1).mean()), square**0.5, world)
    return scale


@pytest.mark.parametrize(("signal", "noise", "world"), [(1.0, 4.0, 2), (1.0, 0.1, 4), (4.0, 100.0, 8)])
def test_it_is_the_noise_over_the_signal(signal: float, noise: float, world: int) -> None:
    found = fed(signal, noise, world=world).value
    assert found == pytest.approx(noise / signal, rel=0.15)


def test_ranks_with_the_same_data_have_no_noise() -> None:
    scale = NoiseScale()
    for _ in range(100):
        scale.update(1.0, 2.0, 4)
    assert (scale.value, scale.agreement) == (0.0, 1.0)


def test_one_rank_few_steps_and_bad_numbers_tell_nothing() -> None:
    alone, few, bad = NoiseScale(), NoiseScale(), NoiseScale()
    for _ in range(100):
        alone.update(1.0, 1.0, 1)
        bad.update(float("nan"), 1.0, 2)
        bad.update(0.5, 0.0, 2)
        bad.update(0.5, 1e200, 2)
    few.update(0.7, 1.0, 2)
    assert alone.value is few.value is bad.value is None


def test_it_survives_being_stored() -> None:
    scale = fed(1.0, 2.0, world=2, steps=100)
    assert decode(encode(scale), NoiseScale) == scale
    assert math.isnan(decode(encode(NoiseScale()), NoiseScale).agreement)
