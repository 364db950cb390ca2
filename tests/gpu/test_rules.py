"""The rules in Triton's language decide as the host, the collector's detector and a replay do, on 100,000 steps.

Each lane of a kernel is a run of its own, so that Triton's interpreter, which is slow, has few launches.
"""

from __future__ import annotations

import math
import platform
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock._arithmetic.host import HostArithmetic
from foreshock._control.decide import SKIPS_IN_WINDOW, WINDOW, Budget
from foreshock._control.history import SKIP_RISE, History, planned_change
from foreshock_collector.analysis import rules
from foreshock_collector.analysis.detection import Detector
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay
from tests.support.kernels import DEVICE, INTERPRETED

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has wheels for Linux on x86-64 only", allow_module_level=True)

import triton
import triton.language as tl

from foreshock._kernels import rules as kernel_rules

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")
HOST = HostArithmetic()
NEAR = 1e-3
"""Where the logarithm of a norm is nearer than this to a limit, rounding may decide otherwise."""
pytestmark: list[pytest.MarkDecorator] = [] if INTERPRETED else [pytest.mark.gpu]


@triton.jit
def history_of_many(norms, planned, state, ceilings, fars, SERIES: tl.constexpr):
    """One step of many independent runs. state: [6, SERIES]."""
    i = tl.arange(0, SERIES)
    ceiling, far, mean, recent, deviation, count, spikes, accepting = kernel_rules.update_history(
        tl.load(norms + i),
        tl.load(planned + i) != 0,
        tl.load(state + i),
        tl.load(state + SERIES + i),
        tl.load(state + 2 * SERIES + i),
        tl.load(state + 3 * SERIES + i),
        tl.load(state + 4 * SERIES + i),
        tl.load(state + 5 * SERIES + i),
    )
    tl.store(ceilings + i, ceiling)
    tl.store(fars + i, far.to(tl.float64))
    tl.store(state + i, mean)
    tl.store(state + SERIES + i, recent)
    tl.store(state + 2 * SERIES + i, deviation)
    tl.store(state + 3 * SERIES + i, count)
    tl.store(state + 4 * SERIES + i, spikes)
    tl.store(state + 5 * SERIES + i, accepting)


RUNS, STEPS = 512, 200


def norms_and_rates() -> tuple[Tensor, Tensor]:
    """Norms and learning rates of many runs: noise, drift, spikes, new levels, planned changes, and what is not finite.

    Both [STEPS, RUNS].
    """
    chance = np.random.default_rng(5)
    shape = (STEPS, RUNS)
    noise = chance.choice([0.02, 0.1, 0.5], RUNS) * chance.standard_normal(shape)
    height = chance.uniform(0, 9, shape) * (chance.random(shape) < 0.03)
    jumps = chance.choice([-3.0, 3.0, 6.0], shape) * (chance.random(shape) < 0.01)
    norms = np.exp(chance.uniform(-5, 5, RUNS) + np.cumsum(jumps, axis=0) + height + noise)
    norms[chance.random(shape) < 0.01] = 0.0
    norms[chance.random(shape) < 0.01] = NAN
    norms[chance.random(shape) < 0.01] = INF
    rates = 1e-3 * np.cumprod(
        np.where(chance.random(shape) < 0.01, chance.choice([0.1, 1.2, 10.0], shape), 1.0), axis=0
    )
    return torch.from_numpy(norms), torch.from_numpy(rates)


@pytest.mark.exhaustive
def test_kernel_host_collector_and_replay_decide_alike_on_a_hundred_thousand_steps() -> None:
    norms, rates = norms_and_rates()
    assert norms.numel() > 100_000
    state = torch.zeros(6, RUNS, dtype=torch.float64, device=DEVICE)
    ceilings, fars = torch.zeros(2, RUNS, dtype=torch.float64, device=DEVICE)
    histories, detectors = [History(HOST) for _ in range(RUNS)], [Detector() for _ in range(RUNS)]
    rule = rules.DEFAULT.gradient
    spikes: list[list[int]] = [[] for _ in range(RUNS)]
    clipped = skipped = planned = near = 0
    for step in range(STEPS):
        remembered = [history.state[1] for history in histories]
        jumps = torch.tensor([planned_change(*pair)[0] for pair in zip(remembered, rates[step].tolist(), strict=True)])
        history_of_many[(1,)](norms[step].to(DEVICE), jumps.to(DEVICE, torch.int32), state, ceilings, fars, SERIES=RUNS)
        planned += int(jumps.sum())
        rows = zip(norms[step].tolist(), rates[step].tolist(), ceilings.tolist(), fars.tolist(), strict=True)
        for run, (norm, rate, ceiling, far) in enumerate(rows):
            standing = histories[run].compare(norm, rate)
            histories[run].state = standing.after
            assert math.isclose(ceiling, standing.ceiling, rel_tol=1e-12) and bool(far) == standing.far

            detector = detectors[run]
            _, high = detector.gradient.band(rule) or (0.0, INF)
            rise = math.log(norm) - detector.gradient._usual if 0 < norm < INF else -INF
            limits = (rule.clamp * detector.gradient._sigma(rule), rule.spike_z * detector.gradient._sigma(rule))
            events = detector.update(
                attempt=0, sequence=step + 1, step=step, norm=norm, loss=None, rate=rate,
                nonfinite=int(not math.isfinite(norm)),
            )  # fmt: skip
            theirs = (norm > high, any(event.kind == "spike" for event in events) and rise > SKIP_RISE)
            spikes[run] += [event.step for event in events if event.kind == "spike"]
            if any(abs(rise - limit) < NEAR for limit in (*limits, SKIP_RISE)):
                near += 1
            else:
                assert (norm > ceiling, bool(far)) == theirs, (run, step)
            clipped += norm > ceiling
            skipped += bool(far)
        after = torch.tensor([history.state[0] for history in histories], dtype=torch.float64).T
        torch.testing.assert_close(state.cpu(), after, rtol=1e-11, atol=1e-13)
    assert clipped > 1500 and skipped > 500 and planned > 250 and near < 500
    for run, found in enumerate(spikes):
        log = [
            Row(step=step, loss=None, norm=norm, rate=rate)
            for step, (norm, rate) in enumerate(zip(norms[:, run].tolist(), rates[:, run].tolist(), strict=True))
        ]
        assert [event.step for event in replay(log).events if event.kind == "spike"] == found


@triton.jit
def budget_of_many(bad, oldest, state, granted, RUNS: tl.constexpr):
    """One step of many independent budgets. state: [3, RUNS]."""
    i = tl.arange(0, RUNS)
    skip, skipped, in_a_row, spent = kernel_rules.grant_skip(
        tl.load(bad + i) != 0,
        tl.load(oldest + i),
        tl.load(state + i),
        tl.load(state + RUNS + i),
        tl.load(state + 2 * RUNS + i),
    )
    tl.store(granted + i, skip.to(tl.float64))
    tl.store(state + i, skipped)
    tl.store(state + RUNS + i, in_a_row)
    tl.store(state + 2 * RUNS + i, spent)


def test_kernel_and_host_spend_the_same_budget() -> None:
    chance = np.random.default_rng(3)
    bad = chance.random((250, RUNS)) < chance.choice([0.02, 0.05, 0.5], RUNS)
    state, window = (torch.zeros(rows, RUNS, dtype=torch.float64, device=DEVICE) for rows in (3, WINDOW))
    granted = torch.zeros(RUNS, dtype=torch.float64, device=DEVICE)
    budgets = [Budget(HOST, CPU) for _ in range(RUNS)]
    for step, now in enumerate(bad):
        budget_of_many[(1,)](
            torch.from_numpy(now.astype(np.int32)).to(DEVICE), window[step % WINDOW], state, granted, RUNS=RUNS
        )
        window[step % WINDOW] = granted
        expected = [budget.grant(bool(each)) for budget, each in zip(budgets, now, strict=True)]
        assert granted.bool().tolist() == expected
    assert state[2].tolist() == [budget.state.spent for budget in budgets]
    assert {0.0, 1.0} == set(state[2].tolist()) and bool((window.sum(0) == SKIPS_IN_WINDOW).any())
