"""The history on the device decides as the collector's does."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._attach.inherited import state_dict_of, wants_history
from foreshock._attach.settings import settings_from
from foreshock._control import history
from foreshock._control.decide import SKIPS_IN_A_ROW, SKIPS_IN_WINDOW, TRIP_LAG, WINDOW, Budget
from foreshock._control.history import SKIP_RISE, History, Standing, loaded, saved
from foreshock._errors import SettingsError
from foreshock_collector.analysis import rules
from foreshock_collector.analysis.detection import Detector
from foreshock_recorder.layout import NormHistory

CPU = torch.device("cpu")
NEAR = 1e-3
"""So near a limit the two may differ, by rounding..."""
MOST_NEAR = 1e-3
"""... on no more than this part of all steps."""
Series = list[tuple[float, float]]
"""Norm and learning rate of each step."""


def test_its_constants_are_the_collectors() -> None:
    rule = rules.DEFAULT.gradient
    ours = (
        history.ALPHA, history.RECENT_ALPHA, history.READY_AFTER, history.LEAST_SIGMA, history.SPIKE_Z,
        history.SPIKE_RISE, history.CLAMP, history.FIRST_DEVIATION, history.ACCEPT_AFTER, history.ACCEPT_ALPHA,
        history.ACCEPT_STEPS, history.PLANNED_RATE_CHANGE,
    )  # fmt: skip
    assert ours == (
        rule.alpha, rule.recent_alpha, rule.ready_after, rule.least_sigma, rule.spike_z, rule.spike_rise,
        rule.clamp, rule.first_deviation, rule.accept_after, rule.accept_alpha, rule.accept_steps,
        rules.DEFAULT.planned_rate_change,
    )  # fmt: skip


def random_series(seed: int, steps: int = 1500) -> Series:
    """A drifting level with noise, spikes, climbs, values that are not finite, and planned changes."""
    chance = random.Random(seed)
    level, noise, rate = chance.uniform(-5, 5), chance.choice([0.02, 0.1, 0.5]), 1e-3
    series: Series = []
    height, runaway = 0.0, 1.0
    for _ in range(steps):
        level += chance.gauss(0, 0.01)
        if chance.random() < 0.01:
            height = chance.uniform(0, 9)
        elif chance.random() < 0.3:
            height = 0.0
        if chance.random() < 0.002:
            level += chance.choice([-3, 3])
        if chance.random() < 0.003:
            rate *= chance.choice([0.1, 10.0, 1.2])
            runaway = chance.choice([1.0, 1.0, 1.6])
        elif chance.random() < 0.1:
            runaway = 1.0
        rate *= runaway
        norm = math.exp(level + height + chance.gauss(0, noise))
        series.append((chance.choice([math.nan, math.inf, 0.0]) if chance.random() < 0.005 else norm, rate))
    return series


def real_series(seed: int) -> Series:
    """A small model in training, whose learning rate is raised until it explodes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    series: Series = []
    for step in range(700):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True) * (40.0 if step % 97 == 96 else 1.0)).square().mean().backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        series.append((norm, optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step > 500:
            optimizer.param_groups[0]["lr"] *= 1.03
    return series


def take(history: History, norm: float, rate: float) -> Standing:
    standing = history.compare(arithmetic_for(CPU).number(torch.tensor(norm, dtype=torch.float64)), rate)
    history.state = standing.after
    return standing


def compared(series: Series) -> Iterator[tuple[bool, bool]]:
    """Of each step: whether the two decide alike, and whether it is so near a limit that they need not."""
    history, detector = History(arithmetic_for(CPU)), Detector()
    rule = rules.DEFAULT.gradient
    for sequence, (norm, rate) in enumerate(series, 1):
        _, high = detector.gradient.band(rule) or (0.0, math.inf)
        usual, sigma = detector.gradient._usual, detector.gradient._sigma(rule)
        bad = not math.isfinite(norm)
        events = detector.update(
            attempt=0, sequence=sequence, step=sequence, norm=norm, loss=None, rate=rate, nonfinite=int(bad)
        )
        rise = math.log(norm) - usual if norm > 0 and not bad else -math.inf
        spike = any(event.kind == "spike" for event in events)
        theirs = (norm > high, spike and rise > SKIP_RISE)
        standing = take(history, norm, rate)
        ours = (norm > float(standing.ceiling), bool(standing.far))
        limits = (rise - rule.clamp * sigma, rise - rule.spike_z * sigma, rise - SKIP_RISE)
        yield ours == theirs, any(abs(limit) < NEAR for limit in limits)


def test_it_decides_as_the_collector_does(capsys: pytest.CaptureFixture[str], arithmetic: str) -> None:
    outcomes = [o for seed in range(12) for o in compared(random_series(seed))]
    outcomes += [o for seed in range(3) for o in compared(real_series(seed))]
    differ = [near for alike, near in outcomes if not alike]
    with capsys.disabled():
        sys.stdout.write(
            f"\nprobe ({arithmetic}) and collector decide differently on {len(differ)} of {len(outcomes)} steps\n"
        )
    assert all(differ), "a decision far from any limit differs"
    assert len(differ) <= MOST_NEAR * len(outcomes)


@pytest.mark.usefixtures("arithmetic")
def test_a_history_continues_where_it_was_saved() -> None:
    series = random_series(3)
    whole, resumed = History(arithmetic_for(CPU)), History(arithmetic_for(CPU))
    for step, (norm, rate) in enumerate(series):
        if step % 200 == 150:
            resumed = History(arithmetic_for(CPU))
            resumed.state = loaded(json.loads(json.dumps(saved(whole.state))), arithmetic_for(CPU))
        standings = [take(history, norm, rate) for history in (whole, resumed)]
        assert len({(float(standing.ceiling), bool(standing.far)) for standing in standings}) == 1
    assert saved(resumed.state) == saved(whole.state)


@pytest.mark.usefixtures("arithmetic")
def test_a_history_continues_where_the_collector_is() -> None:
    chance, rate, ours, detector = random.Random(1), 1e-3, History(arithmetic_for(CPU)), Detector()
    for sequence in range(1, 101):
        norm = math.exp(chance.gauss(0, 0.1))
        take(ours, norm, rate)
        detector.update(attempt=0, sequence=sequence, step=sequence, norm=norm, loss=None, rate=rate)
    theirs = detector.gradient
    numbers = NormHistory(theirs.mean, theirs.recent, theirs.deviation, theirs.count, detector.rate or 0.0)
    resumed = saved(loaded(state_dict_of(numbers), arithmetic_for(CPU)))
    assert resumed == pytest.approx(saved(ours.state), rel=1e-9)


def test_a_learning_rate_that_the_collector_does_not_know_is_no_rate() -> None:
    assert state_dict_of(NormHistory(0.0, 0.0, 0.1, 30, 0.0))["learning_rate"] is None


@pytest.mark.parametrize(
    "change", [{"mean": None}, {"mean": math.nan}, {"count": "many"}, {"learning_rate": []}, {"changing": math.inf}]
)
def test_a_history_that_was_not_saved_by_us_is_refused(change: dict[str, Any]) -> None:
    values: dict[str, Any] = saved(History(arithmetic_for(CPU)).state)
    for wrong in (values | change, {name: value for name, value in values.items() if name not in change}):
        with pytest.raises(SettingsError, match="load_state_dict"):
            loaded(wrong, arithmetic_for(CPU))


def test_the_series_hold_something_to_decide() -> None:
    clipped = skipped = 0
    for series in (*map(random_series, range(12)), *map(real_series, range(3))):
        history = History(arithmetic_for(CPU))
        for norm, rate in series:
            standing = take(history, norm, rate)
            clipped += norm > float(standing.ceiling)
            skipped += bool(standing.far)
    assert clipped > 500 and skipped > 50


def granted(bad: list[bool]) -> tuple[list[bool], list[bool]]:
    """Which steps are left out, and what `tripped` says after each."""
    arithmetic = arithmetic_for(CPU)
    budget = Budget(arithmetic, CPU)
    flags = [arithmetic.number(torch.tensor(float(b))) > 0 for b in bad]
    steps = [(bool(budget.grant(flag)), budget.tripped) for flag in flags]
    return [step[0] for step in steps], [step[1] for step in steps]


@pytest.mark.usefixtures("arithmetic")
def test_no_more_than_three_bad_steps_in_a_row_are_left_out() -> None:
    left_out, _ = granted([False, True, True, True, True, True, False, True])
    assert left_out == [False, True, True, True, False, False, False, True]


@pytest.mark.usefixtures("arithmetic")
def test_no_more_than_five_of_the_last_hundred_steps_are_left_out() -> None:
    bad = [step % 10 == 0 for step in range(2 * WINDOW + 20)]
    left_out, _ = granted(bad)
    assert [step for step, out in enumerate(left_out) if out][:11] == [0, 10, 20, 30, 40, 100, 110, 120, 130, 140, 200]
    assert all(sum(left_out[end - WINDOW : end]) <= SKIPS_IN_WINDOW for end in range(WINDOW, len(left_out)))


@pytest.mark.usefixtures("arithmetic")
def test_a_run_trips_eight_steps_after_its_budget_has_run_out_and_stays_so() -> None:
    _, tripped = granted([True] * SKIPS_IN_A_ROW + [False] * 20)
    assert not any(tripped)
    _, tripped = granted([True] * (SKIPS_IN_A_ROW + 1) + [False] * 20)
    assert tripped == [step >= SKIPS_IN_A_ROW + TRIP_LAG for step in range(24)]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, False),
        ({"step": torch.zeros(()), "sum": torch.zeros(3)}, False),
        ({"step": torch.ones(()), "exp_avg": torch.zeros(3)}, True),
        ({"momentum_buffer": torch.zeros(3)}, True),
        ({"step": None, "of its own": 1}, True),
        ({"step": torch.ones(3)}, True),
        ({"step": ["a", "list"]}, True),
    ],
)
def test_an_optimizer_that_has_stepped_resumes_whatever_it_calls_a_step(state: dict[str, Any], expected: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = state
    assert wants_history(settings_from(skip=True), optimizer) is expected
    assert not wants_history(settings_from(skip=False), optimizer)
