"""A clock that somebody sets, forward or back: no run looks silent or stalled by it, and none waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_collector.clock import SystemClock
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import hello, steps

DAY = 86400.0


class SetClock:
    """A machine whose clock a test sets; time passes only where it says so."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1_800_000_000.0, 1000.0
        self.clock = SystemClock(lambda: self.wall, lambda: self.monotonic)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_a_clock_that_is_set_says_by_how_much_and_once() -> None:
    machine = SetClock()
    machine.pass_by(DAY)
    assert machine.clock.jumped() == 0.0
    machine.wall += 3600.0
    assert machine.clock.jumped() == pytest.approx(3600.0)
    assert machine.clock.jumped() == 0.0
    machine.wall -= 1.0
    assert machine.clock.jumped() == 0.0
    machine.wall -= DAY
    assert machine.clock.jumped() == pytest.approx(-DAY)


@pytest.mark.parametrize("set_by", [DAY, -DAY])
def test_a_run_goes_on_across_a_clock_that_is_set(tmp_path: Path, set_by: float) -> None:
    machine, session = SetClock(), Session()
    store = Store(tmp_path / "db")
    intake = Intake(
        runs := Runs(), store, machine.clock, ended_seconds=900.0, silent=900.0, jumped=machine.clock.jumped
    )
    for rank in (0, 1):
        place = pb.Topology(rank=rank, world_size=2)
        intake.apply(hello(instance=f"r-{rank}", topology=place), session)
        intake.apply(steps(1, [1.0] * 20, instance=f"r-{rank}"), session)
    intake.commit()
    intake.apply(steps(21, [1.0], instance="r-0"), session)
    machine.wall += set_by
    for _ in range(11):
        machine.pass_by(1.0)
        intake.commit()
        intake.expire()
    run = runs.get("r")
    assert run is not None
    # The step that one rank has made waits for the other as long as ever, and no longer.
    assert run.totals.counters["steps"] == 21
    assert (dict(run.incidents.open_by_verdict()), condition(run, machine.wall, 900.0)) == ({}, "running")
    assert machine.wall - 5 < run.totals.last["step"] <= machine.wall
    machine.pass_by(901.0)
    intake.expire()
    assert condition(run, machine.wall, 900.0) == "failed"
    store.close()


def test_after_a_restart_with_a_clock_set_back_silence_counts_from_now(tmp_path: Path) -> None:
    machine = SetClock()
    machine.wall += DAY
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, machine.clock, ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), Session())
    intake.commit()
    store.close()
    machine.wall -= DAY
    store = Store(tmp_path / "db")
    runs = store.load(machine.wall)
    run = runs.get("r")
    assert run is not None and run.active(machine.wall + 899, 900.0)
    assert not run.active(machine.wall + 901, 900.0)
    store.close()
