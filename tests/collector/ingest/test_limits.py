"""Limits: what one machine may have, and what becomes of one run, rank or stream too many."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from foreshock_collector.ingest import run_limits, service
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.server import Server
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.retry import retry_seconds
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import Stream, config, hello, serving


def test_one_machine_cannot_take_all_runs_and_ended_ones_make_room(tmp_path: Path) -> None:
    clock, flood, honest = Clock(), Session(peer="ipv4:10.0.0.1:4000"), Session(peer="ipv4:10.0.0.2:4000")
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0, most_runs=10)
    for number in range(20):
        intake.apply(hello(f"flood-{number}", launch_id=f"{number}"), flood)
    assert (len(flood.registered), len(flood.refused)) == (5, 15)
    assert "5 runs of ipv4:10.0.0.1 report already" in flood.refused["flood-19-0"]
    for number in range(6):
        intake.apply(hello(f"run-{number}", launch_id="l"), honest)
    assert len(honest.registered) == 5
    # Ranks of a run that is there already are no further runs.
    place = pb.Topology(rank=0, world_size=1)
    intake.apply(hello("run-0", launch_id="l", topology=place), honest)
    assert "run-0-0" in honest.registered
    for _ in range(3):
        clock.now += 901
        intake.commit()
        intake.expire()
    intake.commit()
    intake.apply(hello("later", launch_id="later"), honest)
    assert "later-0" in honest.registered
    assert intake.statistics.refused["limit"] == 16
    store.close()


def test_one_machine_cannot_take_all_ranks_nor_fill_a_run_with_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_limits, "MOST_RANKS", 60)
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0, most_runs=4)

    def begin(session: Session, run: str, launch: str, ranks: int) -> int:
        for rank in range(ranks):
            place = pb.Topology(rank=rank, world_size=ranks)
            # Handed in after their ranks have exited, all launches of a name are of one run.
            told = hello(run, instance=f"{run}-{launch}-{rank}", launch_id=launch, topology=place, exited=True)
            intake.apply(told, session)
        intake.commit()
        return len(session.registered)

    flood, honest = Session(peer="ipv4:10.0.0.1:4000"), Session(peer="ipv4:10.0.0.2:4000")
    assert begin(flood, "huge", "1", 40) == 30
    assert "30 ranks of ipv4:10.0.0.1 report already, half" in flood.refused["huge-1-39"]
    assert begin(honest, "theirs", "1", 2) == 2
    # What is known is never refused.
    assert begin(flood, "huge", "1", 30) == 30
    again = Session(peer="ipv4:10.0.0.3:4000")
    assert [begin(again, "again", str(number), 1) for number in range(25)][-1] == 20
    assert "20 launches of ipv4:10.0.0.3 report already" in again.refused["again-24-0"]
    store.close()


async def accepted(server: Server) -> Stream | None:
    """A stream that has sent a hello; None if it was refused."""
    stream = Stream(server)
    try:
        await stream.send(hello("late", launch_id="late"))
        await stream.positions(1)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await stream.close()
        return None
    return stream


def test_one_stream_too_many_is_told_when_to_try_again_and_one_that_ends_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_MOST_STREAMS", 4)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            streams = [Stream(server), Stream(server)]
            for number, stream in enumerate(streams):
                await stream.send(hello(f"run-{number}", launch_id=f"{number}"))
                await stream.positions(1)
            third = Stream(server)
            code, text = await third.refusal()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and text.startswith(
                "2 streams of ipv4:127.0.0.1 are open"
            )
            assert retry_seconds(await third.call.trailing_metadata()) == 30.0
            await streams[0].close()
            while (again := await accepted(server)) is None:
                pass
            for stream in (third, again, streams[1]):
                await stream.close()

    serving(test())


def test_runs_that_never_step_are_counted_too(tmp_path: Path) -> None:
    session, store = Session(peer="ipv4:10.0.0.1:4000"), Store(tmp_path / "db")
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0, most_runs=10)
    for wave in range(4):
        for number in range(5):
            intake.apply(hello(f"{wave}-{number}", launch_id=f"{wave}-{number}"), session)
        intake.commit()
    assert (len(session.registered), len(session.refused)) == (5, 15)
    store.close()
