"""A loss that is no longer observed is not health."""

from __future__ import annotations

import pytest

from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay
from tests.support.job_in_memory import RANK_COLUMNS, Job


def verdict_on(losses: list[float | None], *, norm: float | None = 1.0) -> tuple[str, int]:
    """Cause, and the step where it began."""
    found = replay([Row(step=i, loss=loss, norm=norm, rate=None) for i, loss in enumerate(losses)]).verdict
    return found.cause, found.first_bad_step


def every(interval: int, count: int) -> list[float | None]:
    return [2.0 if i % interval == 0 else None for i in range(count)]


@pytest.mark.parametrize("calm", [20, 100, 5000])
def test_a_loss_that_stops_while_steps_go_on_is_a_fault_from_its_last_step_on(calm: int) -> None:
    assert verdict_on([*[2.0] * calm, *[None] * 20]) == ("missing_loss", calm)
    assert verdict_on([*[2.0] * calm, *[None] * 19]) == ("healthy", -1)


@pytest.mark.parametrize("interval", [10, 50, 300])
def test_a_loss_that_is_observed_now_and_then_is_missing_after_three_times_as_long(interval: int) -> None:
    rare = every(interval, 30 * interval)
    assert verdict_on([*rare, *[None] * interval])[0] == "healthy"
    assert verdict_on([*rare, *[None] * (3 * interval)])[0] == "missing_loss"


def test_a_run_that_never_observes_a_loss_is_not_missing_one() -> None:
    assert verdict_on([None] * 500)[0] == "healthy"


def test_a_live_run_whose_loss_stops_has_an_incident_until_it_comes_back() -> None:
    job = Job()
    job.train(60)
    for rank in (0, 1):
        job.tell(rank, [1.0] * 30, local_norm=[1.5 + rank] * 30, flags=[0] * 30)
    job.settle(1.0)
    assert job.causes(only_open=True) == ["missing_loss"]
    for rank in (0, 1):
        job.tell(rank, [1.0], local_norm=[1.5 + rank], flags=[RANK_COLUMNS])
    job.settle(1.0)
    assert job.causes(only_open=True) == []
