"""Runs that explode in their first steps, before there is a history."""

from __future__ import annotations

import math

import pytest

from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import Replay, replay

Log = list[tuple[float, float]]
"""Loss and norm of each step."""


def replayed(log: Log) -> Replay:
    return replay([Row(step=step, loss=loss, norm=norm, rate=0.1) for step, (loss, norm) in enumerate(log)])


def build_ups(found: Replay) -> list[float]:
    return [event.step for event in found.events if event.kind == "build_up"]


DEAD = [(931_354.0, 29_839.0), (52_000.0, 4_100.0), (310_000.0, 9_800.0), (88_000.0, 5_200.0)]


@pytest.mark.parametrize(
    "log",
    [
        # Adam at a thousand, three hundred and a hundred times a good rate: weights are destroyed by the first updates.
        [(2.3, 0.4), *DEAD * 100],
        # The loss falls to that of a guess, and no further.
        [
            (2.32, 0.41),
            (32.7, 26.4),
            (23.5, 19.9),
            (20.7, 19.5),
            (8.0, 8.2),
            (3.7, 2.5),
            *[(2.3, 1.2), (2.5, 1.9)] * 200,
        ],
        [(2.04, 0.587), *[(18.7, 18.3), (22.9, 22.0), (12.7, 12.9), (30.4, 17.8)] * 100],
        [(3.43, 0.96), *[(13.1, 9.4), (31.4, 10.6), (32.6, 13.3), (40.5, 17.4)] * 100],
        # A jump, and a loss that stays there.
        [(4.43, 0.857), (144.9, 94.6), (188.7, 40.9), (489.6, 52.7), *[(1200.0, 300.0)] * 396],
    ],
)
def test_an_explosion_that_stays_finite_is_a_build_up_within_three_steps_and_then_a_divergence(log: Log) -> None:
    found = replayed(log)
    assert build_ups(found)[0] == 3
    assert (found.verdict.cause, found.verdict.likely_root) == ("loss_divergence", "learning_rate")
    assert found.verdict.first_bad_step == 3


@pytest.mark.parametrize(
    "log",
    [
        # The first update overshoots, and training goes on.
        [(1.26, 1.85), (29.6, 28.9), (4.8, 6.05), (2.05, 3.05), *[(1.2, 1.0)] * 200],
        # A warm-up: norms grow while the loss falls.
        [(2.3 * 0.98**i, 0.3 * 1.3 ** min(i, 15)) for i in range(200)],
        # A policy without reward at first, then with a penalty that grows out of nothing at a steady norm.
        [(3e-4 * (i + 1), 0.25) for i in range(500)],
        [(0.0, 0.1), *[(3e-4 * (i + 1), 0.5) for i in range(500)]],
        # One sample in a batch: the first loss was small by chance.
        [(0.3, 0.6), (1.1, 1.7), (0.8, 2.2), (0.7, 1.4), *[(1.0, 1.5), (0.6, 1.2)] * 100],
    ],
)
def test_a_start_that_only_looks_like_it_is_healthy(log: Log) -> None:
    found = replayed(log)
    assert found.verdict.cause == "healthy"
    assert not build_ups(found)


def test_a_run_that_recovers_from_its_explosion_is_warned_of_and_no_divergence() -> None:
    found = replayed([(1.11, 0.478), (32.6, 61.3), (246.0, 275.0), (50.3, 65.6), *[(1.0, 0.8)] * 200])
    assert build_ups(found) == [3]
    assert found.verdict.cause == "healthy"


def test_a_nan_at_the_second_step_did_not_come_after_quiet() -> None:
    found = replayed([(2.3, 0.4), (math.nan, math.nan)])
    assert (found.verdict.cause, found.verdict.confidence) == ("unknown", 0.3)
    assert "after 1 step" in found.verdict.summary
    assert not any("no spike or build-up" in line for line in found.verdict.evidence)


@pytest.mark.parametrize("calm", [1, 4, 100])
def test_a_loss_that_jumps_with_the_nan_of_the_gradient_is_an_explosion(calm: int) -> None:
    found = replayed([*[(4.7, 1.0)] * calm, (5e7, math.nan)])
    assert found.verdict.cause == "exploding_gradients"
    assert found.verdict.likely_root == ("learning_rate" if calm < 40 else "unknown")
    assert "jumped from about 4.7 to 5e+07" in found.verdict.summary
    assert replayed([*[(4.7, 1.0)] * 100, (5.0, math.nan)]).verdict.cause == "nonfinite_gradient"
