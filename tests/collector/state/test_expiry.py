"""Runs that have ended: their series go after a while, their history stays."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.server import Server
from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import Stream, config, families, goodbye, hello, serving, steps, value


async def closed(stream: Stream) -> None:
    while not (await stream.call.read()).positions[0].closed:
        pass


def test_the_series_of_an_ended_run_stay_for_a_while_and_go_its_history_stays(tmp_path: Path) -> None:
    clock = Clock()

    async def test() -> None:
        settings = config(tmp_path, metrics_cache_seconds=0.0)
        async with Server(settings, clock) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 5), goodbye(5))
            await closed(stream)
            assert value(await families(server), "foreshock_run_active", run="r") == 0
            clock.now += settings.retention_seconds - 1
            assert value(await families(server), "foreshock_steps", run="r") == 5
            clock.now += 2
            assert (await families(server))["foreshock_steps"].samples == []
            address = f"{server.url}/api/v1/runs/r/steps"
            async with aiohttp.ClientSession() as session, session.get(address) as response:
                assert (await response.json())["step"] == [0, 1, 2, 3, 4]
            await stream.close()

    serving(test())


def test_a_run_that_falls_silent_is_over_after_a_while(tmp_path: Path) -> None:
    clock = Clock()

    async def test() -> None:
        settings = config(tmp_path, metrics_cache_seconds=0.0)
        async with Server(settings, clock) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 5))
            await stream.stored(5)
            clock.now += settings.silent_seconds - 1
            assert value(await families(server), "foreshock_run_active", run="r") == 1
            clock.now += 2
            assert value(await families(server), "foreshock_run_active", run="r") == 0
            clock.now += settings.retention_seconds
            assert (await families(server))["foreshock_run_active"].samples == []
            await stream.close()

    serving(test())


def test_an_ended_run_that_comes_back_goes_on_counting_where_it_was(tmp_path: Path) -> None:
    clock = Clock()

    async def test() -> None:
        settings = config(tmp_path, metrics_cache_seconds=0.0)
        async with Server(settings, clock) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 5), goodbye(5))
            await closed(stream)
            await stream.close()
        clock.now += 10 * settings.retention_seconds
        async with Server(settings, clock) as server:
            assert (await families(server))["foreshock_steps"].samples == []
            again = Stream(server)
            await again.send(hello(instance="r-1", launch_id="second"), steps(1, [1.0] * 3, instance="r-1"))
            await again.stored(3)
            assert value(await families(server), "foreshock_steps", run="r") == 8
            assert value(await families(server), "foreshock_run_active", run="r") == 1
            await again.close()

    serving(test())


def test_a_run_that_dies_before_its_first_step_is_told_of_and_its_incident_goes_with_its_series(tmp_path: Path) -> None:
    clock, session = Clock(), Session()
    died = pb.Exit(instance="r-0", reason=pb.ExitReason.EXCEPTION, detail="OutOfMemoryError: CUDA out of memory")
    store = Store(tmp_path / "died.db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    intake.apply(hello(), session)
    intake.commit()
    clock.now += 1
    intake.apply(pb.FromRecorder(exit=died), session)
    intake.commit()
    store.close()
    # The collector is away at just that moment.
    store = Store(tmp_path / "died.db")
    runs = store.load(clock())
    intake = Intake(runs, store, clock, ended_seconds=900.0, silent=900.0)
    run = runs.get("r")
    assert run is not None
    for _ in range(4):
        clock.now += 1
        intake.commit()
    assert (run.incidents.open_by_verdict()["crashed"], condition(run, clock(), 900.0)) == (1, "failed")
    clock.now += 900
    intake.expire()
    # Or its next attempt would page for it a second time.
    assert (run.incidents.open_by_verdict()["crashed"], run.evicted) == (0, True)
    store.close()
