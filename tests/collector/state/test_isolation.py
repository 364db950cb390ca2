"""An error of the collector's own costs one run its evaluation, and nobody anything else."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.catalogue import RUN_STAGES
from foreshock_collector.commands.cli import status
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.server import Server
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.condition import condition
from foreshock_collector.state.encoding import encode
from foreshock_collector.state.evaluator import Evaluator
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.incidents import DEATH, FAILURE
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_collector.web import exposition
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, families, goodbye, hello, serving, steps, value


@pytest.fixture
def errors_expected() -> None:
    """Here they are what the tests are about."""


def failing(real: Callable[..., Any], *, for_run: Callable[..., bool]) -> Callable[..., Any]:
    """The real one, but for the run that is meant."""

    def broken(*arguments: Any, **options: Any) -> Any:
        if for_run(*arguments):
            raise ZeroDivisionError("float division by zero")
        return real(*arguments, **options)

    return broken


async def answer(server: Server, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/{path}") as response:
        return response.status, json.loads(await response.text())


async def both(server: Server, *, first: int = 1) -> tuple[Stream, Stream]:
    """Two runs, three steps each, stored."""
    broken, whole = Stream(server), Stream(server)
    for stream, run in ((broken, "broken"), (whole, "whole")):
        await stream.send(hello(run, launch_id=run), steps(first, [1.0, 2.0, 3.0], run=run))
    await broken.stored(first + 2)
    await whole.stored(first + 2)
    return broken, whole


async def end(*streams: Stream) -> None:
    for stream in streams:
        await stream.close()


def errors(found: dict[str, Any], run: str) -> dict[str, float]:
    stages = {s.labels["stage"]: s.value for s in found["foreshock_run_errors"].samples if s.labels["run"] == run}
    assert stages.keys() == set(RUN_STAGES)
    return {stage: count for stage, count in stages.items() if count}


def test_a_run_of_zero_losses_one_of_nan_and_a_healthy_one_do_each_other_nothing(tmp_path: Path) -> None:
    losses = {"zero": 0.0, "nan": math.nan, "healthy": 2.0}

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            streams = {run: Stream(server) for run in losses}
            model = pb.ModelSummary(layers=["a"], parameters=["a"], parameter_sizes=[1], parameter_layers=[0])
            for first in range(1, 81, 20):
                for run, loss in losses.items():
                    if first == 1:
                        await streams[run].send(hello(run, launch_id=run, model=model))
                        await families(server)
                    told = [loss if run != "nan" or first > 60 else 2.0] * 20
                    rows = steps(first, [1.0] * 20, run=run, loss=told, flags=[pb.LOSS_OBSERVED] * 20)
                    await streams[run].send(rows)
                    await families(server)
                for stream in streams.values():
                    await stream.stored(first + 19)
            found = await families(server)
            for run in losses:
                assert value(found, "foreshock_steps", run=run) == 80
                assert errors(found, run) == {}
            _, told_of = await answer(server, "api/v1/runs")
            verdicts = {run["run"]: run["verdict"] for run in told_of["runs"]}
            assert verdicts == {"zero": "healthy", "nan": "sudden_nonfinite", "healthy": "healthy"}
            await end(*streams.values())
        async with Server(config(tmp_path)) as server:
            found = await families(server)
            assert {run: value(found, "foreshock_steps", run=run) for run in losses} == dict.fromkeys(losses, 80.0)

    serving(test())


def test_an_error_of_evaluation_costs_one_run_its_verdicts_and_no_record(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def is_meant(_: Evaluator, attempt: Attempt, *__: Any) -> bool:
        return attempt.launch == "broken" and attempt.finalized == 3

    monkeypatch.setattr(Evaluator, "_detect", failing(Evaluator._detect, for_run=is_meant))

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            broken, whole = await both(server)
            await broken.send(steps(4, [1.0, math.nan], run="broken", global_nan_parameters=[0, 1]))
            await broken.stored(5)
            found = await families(server)
            assert errors(found, "broken") == {"evaluate": 1}
            assert errors(found, "whole") == {}
            assert value(found, "foreshock_steps", run="broken") == 5
            _, of_it = await answer(server, "api/v1/runs/broken")
            assert of_it["errors"] == {"evaluate": 1}
            assert of_it["verdict"] == "sudden_nonfinite"  # evaluated again from the next step on
            _, history = await answer(server, "api/v1/runs/broken/steps")
            assert history["sequence"] == [1, 2, 3, 4, 5]
            await asyncio.to_thread(status, ["--url", server.url])
            assert capsys.readouterr().out.endswith(
                "broken: internal errors in the collector, see its log: evaluate 1\n"
            )
            await end(broken, whole)
        async with Server(config(tmp_path)) as server:
            found = await families(server)
            assert errors(found, "broken") == {"evaluate": 1}
            assert value(found, "foreshock_steps", run="broken") == 5

    serving(test())
    (told,) = [record for record in caplog.records if record.name == "foreshock_collector.state.errors"]
    assert "run 'broken': evaluate failed" in told.getMessage()
    assert told.exc_info


def test_an_error_that_comes_up_at_every_tick_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Evaluator, "check_stall", failing(Evaluator.check_stall, for_run=lambda *_: True))
    runs = Runs()
    runs.register(hello().hello, 0.0)
    (run,) = runs
    for now in range(5):
        run.finalize_steps(float(now))
    assert run.errors.nonzero() == {"evaluate": 5}
    assert len(caplog.records) == 1


def test_a_step_that_cannot_be_put_together_leaves_no_hole_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        RecordBuffer, "_assemble", failing(RecordBuffer._assemble, for_run=lambda _, __, numbers: 2 in numbers)
    )
    runs, store = Runs(), Store(":memory:")
    instance = runs.register(hello().hello, 0.0)
    (run,) = runs
    run.ingest(instance, steps(1, [1.0] * 5).steps, 0.0)
    run.finalize_steps(0.0)
    store.commit(runs)
    assert store.steps("r", attempt=0, after=0, limit=10)["sequence"] == [1, 3, 4, 5]
    assert (instance.stored, run.totals.counters["steps"], run.errors.nonzero()) == (5, 4, {"evaluate": 1})
    store.close()


def test_records_that_cannot_be_taken_in_are_stored_and_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Attempt, "write", failing(Attempt.write, for_run=lambda attempt, *_: attempt.launch == "broken")
    )

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            streams = await both(server)
            found = await families(server)
            assert errors(found, "broken") == {"ingest": 1}
            assert value(found, "foreshock_steps", run="whole") == 3
            await end(*streams)

    serving(test())
    with closing(sqlite3.connect(tmp_path / "db")) as database:
        assert database.execute("SELECT count(*) FROM rank_window WHERE run='broken'").fetchone() == (1,)


def test_an_exit_is_stored_though_records_of_another_rank_cannot_be_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, store = Session(), Store(tmp_path / "db")
    intake = Intake(Runs(), store, lambda: 1000.0, ended_seconds=900.0, silent=900.0)
    for rank in range(2):
        intake.apply(hello(instance=f"r-{rank}", topology=pb.Topology(rank=rank, world_size=2)), session)
        intake.apply(steps(1, [1.0], instance=f"r-{rank}"), session)
    intake.commit()
    intake.apply(goodbye(1), session)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "write", failing(Attempt.write, for_run=lambda *_: True))
        intake.apply(steps(2, [1.0], instance="r-1"), session)
    intake.commit()
    assert [(each.instance, each.closed) for each in intake.positions(session)] == [("r-0", True), ("r-1", False)]
    store.close()
    store = Store(tmp_path / "db")
    (run,) = store.load(1000.0)
    assert {rank: instance.closed for rank, instance in run.newest.instances.items()} == {0: "FINISHED", 1: ""}
    store.close()


def test_a_state_that_cannot_be_stored_keeps_no_record_from_being_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Run.state
    monkeypatch.setattr(Run, "state", lambda run: object() if run.name == "broken" else real(run))

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            streams = await both(server)
            found = await families(server)
            assert errors(found, "broken").keys() == {"store"}
            assert errors(found, "whole") == {}
            await end(*streams)
        monkeypatch.undo()
        async with Server(config(tmp_path)) as server:
            again = Stream(server)
            await again.send(hello("broken", launch_id="broken"), steps(3, [3.0, 4.0], run="broken"))
            await again.stored(4)
            _, history = await answer(server, "api/v1/runs/broken/steps")
            assert history["sequence"] == [1, 2, 3, 4]
            await end(again)

    serving(test())


def test_a_run_that_cannot_be_read_is_set_aside_and_its_ranks_begin_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            await end(*await both(server))
        with closing(sqlite3.connect(tmp_path / "db")) as database, database:
            database.execute("UPDATE runs SET state=? WHERE run='broken'", (encode({}),))
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            found = await families(server)
            assert value(found, "foreshock_collector_errors", stage="load") == 1
            assert value(found, "foreshock_steps", run="whole") == 3
            streams = await both(server, first=4)
            assert value(await families(server), "foreshock_steps", run="broken-2") == 3
            await end(*streams)

    serving(test())
    (told,) = caplog.records
    assert told.getMessage().startswith("run 'broken', which is set aside: load failed")
    with closing(sqlite3.connect(tmp_path / "db")) as database:
        kept = database.execute("SELECT run, count(*) FROM steps GROUP BY run ORDER BY run").fetchall()
    assert kept == [("broken", 3), ("broken-2", 3), ("whole", 6)]


@pytest.mark.parametrize("path", ["api/v1/runs?recent=1", "api/v1/runs", "api/v1/runs/whole"])
def test_a_run_that_cannot_be_shown_is_told_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    broken = failing(condition, for_run=lambda run, *_: run.name == "broken")
    monkeypatch.setattr("foreshock_collector.state.summary.condition", broken)
    monkeypatch.setattr(
        exposition.RunSeries,
        "_run_samples",
        failing(exposition.RunSeries._run_samples, for_run=lambda _, run, __: run.name == "broken"),
    )

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            streams = await both(server)
            code, told = await answer(server, path)
            assert code == 200
            for run in told.get("runs", []):
                assert (run["condition"], bool(run["errors"])) == (
                    ("unknown", True) if run["run"] == "broken" else ("running", False)
                )
            code, told = await answer(server, "api/v1/runs/broken")
            assert (code, "see its log" in told["error"]) == (500, True)
            found = await families(server)
            assert errors(found, "broken").keys() == {"page", "expose"}
            assert [s.labels["run"] for s in found["foreshock_run_active"].samples] == ["whole"]
            await end(*streams)

    serving(test())


def test_a_full_disk_acknowledges_nothing_loses_nothing_and_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def ready(server: Server) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/-/ready") as response:
            return response.status

    async def failures(server: Server) -> float:
        return value(await families(server), "foreshock_collector_errors", stage="commit")

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0]))
            await stream.stored(1)
            assert (await failures(server), await ready(server)) == (0, 200)
            database = server.store._db
            database.execute(f"PRAGMA max_page_count={database.execute('PRAGMA page_count').fetchone()[0]}")
            for first in range(2, 2002, 100):
                await stream.send(steps(first, [1.0] * 100))
            while await failures(server) < 2:
                await asyncio.sleep(0.05)
            assert await ready(server) == 503
            assert value(await families(server), "foreshock_steps") > 1  # it is evaluated all the same
            database.execute("PRAGMA max_page_count=1000000")
            await stream.stored(2001)
            assert await ready(server) == 200
            await stream.close()
        async with Server(config(tmp_path)) as server:
            assert value(await families(server), "foreshock_steps") == 2001

    serving(test())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("cannot commit: database or disk is full; nothing is acknowledged")
    assert not caplog.records[0].exc_info
    assert told[1] == "commits succeed again"


def test_a_commit_that_fails_altogether_is_made_good_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))
    broken = failing(Intake.commit_in_parts, for_run=lambda _: next(failures, None) is not None)
    monkeypatch.setattr(Intake, "commit_in_parts", broken)

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            await end(*await both(server))
            while next(failures, None) is not None:
                await asyncio.sleep(0.05)
            assert value(await families(server), "foreshock_collector_errors", stage="commit") >= 1

    serving(test())


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1e308, 0.0])
def test_a_loss_at_no_time_is_one_at_the_time_it_was_heard_of(seconds: float) -> None:
    runs, store = Runs(), Store(":memory:")
    instance = runs.register(hello().hello, 0.0)
    (run,) = runs
    run.record_event(instance, pb.Event(instance="r-0", kind=pb.Event.RANK_LOST, wall_seconds=seconds), 1e9)
    assert instance.left_seconds == 1e9
    store.commit(runs)
    assert not run.errors.nonzero()
    store.close()


def test_an_attempt_whose_detection_restarts_has_no_open_incident() -> None:
    runs = Runs(lambda _: DEFAULT)
    instance = runs.register(hello().hello, 0.0)
    (run,) = runs
    bad: dict[str, Any] = {"flags": [pb.LOSS_OBSERVED] * 4, "loss": [2.0, 2.0, math.nan, math.nan]}
    run.ingest(instance, steps(1, [1.0, 1.0, math.nan, math.nan], **bad).steps, 0.0)
    run.finalize_steps(0.0)
    run.close(instance, pb.Exit(instance="r-0", reason=pb.ExitReason.LOST, detail="SIGKILL", last_sequence=4), 0.5)
    assert run.newest.incidents.keys() == {FAILURE}
    run.newest.incidents[DEATH] = 0
    run.newest.detector = None  # type: ignore[assignment]
    run.ingest(instance, steps(5, [1.0]).steps, 1.0)
    run.finalize_steps(1.0)
    assert run.errors.nonzero() == {"evaluate": 1}
    assert run.newest.incidents == {DEATH: 0}  # of ranks, not of steps
    assert run.incidents.newest is not None
    assert run.incidents.newest.closed_seconds == 1.0
    run.ingest(instance, steps(6, [math.nan], global_nan_parameters=[1.0]).steps, 2.0)
    run.finalize_steps(2.0)
    assert [incident.closed_seconds for incident in run.incidents.kept] == [1.0, None]
