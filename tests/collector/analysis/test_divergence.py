"""Losses that climb away from their best, and those that only look like it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay

SEEDS = range(8)


def verdict_on(losses: list[float], *, norm: float = 7.9, seed: int = 0) -> str:
    """Verdict on a run whose norm is flat, but for noise."""
    norms = norm * np.exp(0.05 * np.random.default_rng(seed).standard_normal(len(losses)))
    rows = [
        Row(step=i, loss=loss, norm=norm, rate=1e-3)
        for i, (loss, norm) in enumerate(zip(losses, norms.tolist(), strict=True))
    ]
    return replay(rows).verdict.cause


def noisy(levels: list[float], deviation: float, seed: int) -> list[float]:
    chance = np.random.default_rng(seed).standard_normal(len(levels)).tolist()
    return [level + deviation * by for level, by in zip(levels, chance, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_steady_climb_from_the_best_loss_diverges_within_thirty_steps_though_the_norm_is_flat(seed: int) -> None:
    climb = np.linspace(11.6, 20.4, 30).tolist()
    assert verdict_on(noisy([11.6] * 60 + climb, 0.1, seed)) == "loss_divergence"
    fallen = [11.0 * 0.97**i for i in range(100)]
    assert (
        verdict_on(noisy([*fallen, *(fallen[-1] * (1 + 0.04 * i) for i in range(40))], 0.01, seed)) == "loss_divergence"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_curriculum_that_is_learned_again_is_healthy(seed: int) -> None:
    learned = [3.0 * 0.98**i + 1.0 for i in range(200)]
    for height, steps in ((1.0, 1), (2.0, 8), (4.0, 12)):
        rise = [learned[-1] + height * (i + 1) / steps for i in range(steps)]
        again = [learned[-1] + height * math.exp(-i / 150) for i in range(600)]
        assert verdict_on(noisy([*learned, *rise, *again], 0.02, seed)) == "healthy"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_penalty_that_grows_out_of_nothing_is_healthy(seed: int) -> None:
    """Such as GRPO's distance from the reference model: the loss starts at 0, and only ever rises."""
    penalty = [3e-4 * (i + 1) for i in range(500)]
    assert (
        verdict_on([loss * scale for loss, scale in zip(penalty, noisy([1.0] * 500, 0.1, seed), strict=True)])
        == "healthy"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_around_zero_has_no_best_to_be_compared_with(seed: int) -> None:
    slow = [0.02 * math.sin(i / 80) for i in range(1500)]
    assert verdict_on(noisy(slow, 0.03, seed)) == "healthy"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_wanders_does_not_climb(seed: int) -> None:
    steps = np.random.default_rng(seed).standard_normal(3000)
    wandering = np.zeros(3000)
    for i in range(1, 3000):
        wandering[i] = 0.98 * wandering[i - 1] + 0.02 * steps[i]
    assert verdict_on(np.exp(wandering).tolist()) == "healthy"
