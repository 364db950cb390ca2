"""A training that waits while another one of its process steps: when it counts as finished, and that it may return."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import ranks
from foreshock_recorder.delivery import POLL_SECONDS, Delivery
from foreshock_recorder.folder import lock
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.ranks import Rank
from foreshock_recorder.ring import Ring
from tests.support.fake_collector import FakeCollector
from tests.support.listeners import Listener, StoringListener
from tests.support.rank_process import RankProcess
from tests.support.rings import FIRST, make_ring, measure, step

HOUR = 3600.0


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path, world_size=1)


@pytest.mark.parametrize(("step_seconds", "patience"), [(0.1, 30.0), (7.0, 70.0), (120.0, 300.0)])
def test_it_counts_as_finished_after_half_a_minute_or_ten_of_its_steps(
    ring: Ring, step_seconds: float, patience: float
) -> None:
    for sequence in (1, 2, 3, 4):
        # An evaluation came before the last of them.
        seconds = sequence * step_seconds + (HOUR if sequence == 4 else 0.0)
        ring.begin_step(sequence, step=0, wall=0, monotonic=seconds, learning_rate=0.5)
        measure(ring, sequence)
        ring.write_observed(sequence, step=None, loss=1.0)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1, 2, 3, 4]
    ring.write_idle(True)
    listener.store(4)
    listener.ask(after=1.0)
    exits = [message.HasField("exit") for message in listener.ask(after=patience - 1.0)]
    assert not any(exits) and not listener.rank.exited
    (finished,) = [message.exit for message in listener.ask(after=1.0) if message.HasField("exit")]
    assert (finished.reason, finished.last_sequence) == (pb.ExitReason.FINISHED, 4)


def test_one_that_steps_again_sooner_was_never_finished(ring: Ring) -> None:
    step(ring, 1)
    listener = StoringListener(ring, Runs()).run_stream()
    ring.write_idle(True)
    listener.run_stream(rounds=20)
    ring.write_idle(False)
    listener.run_stream(rounds=2)
    ring.write_idle(True)
    listener.run_stream(rounds=20)
    assert listener.instance.closed == "" and not listener.rank.delivered


def test_one_that_steps_again_later_goes_on_as_the_same_run_and_has_not_stalled(ring: Ring) -> None:
    for sequence in range(1, 40):
        step(ring, sequence)
    listener = StoringListener(ring, Runs()).run_stream()
    ring.write_idle(True)
    listener.run_stream()
    run = listener.run
    assert (listener.instance.closed, listener.rank.delivered) == ("FINISHED", True)
    assert condition(run, listener.now, 900.0) == "ended"
    for _ in range(2):
        listener.now += HOUR
        ring.write_idle(False)
        step(ring, ring.begun + 1)
        listener.run_stream(rounds=3)
        assert (listener.instance.closed, listener.rank.delivered) == ("", False)
        assert condition(run, listener.now, 900.0) == "running"
        ring.write_idle(True)
        listener.run_stream()
        assert condition(run, listener.now, 900.0) == "ended"
    ring.write_idle(False)
    step(ring, ring.begun + 1)
    ring.write_exit(ExitReason.EXCEPTION, "ValueError: bad batch")
    kept = not listener.rank.done
    assert kept
    listener.run_stream()
    assert listener.rank.done
    assert (listener.instance.closed, listener.rank.delivered) == ("EXCEPTION", True)
    assert run.totals.counters["steps"] == listener.instance.position == 42
    assert [each.name for each in listener.runs] == ["crimson-otter"] and len(run.attempts) == 1
    assert [incident.verdict.cause for incident in run.incidents.kept] == ["crashed"]


@pytest.mark.parametrize("finished", [False, True])
def test_one_that_was_idle_when_its_process_was_killed_has_finished(tmp_path: Path, finished: bool) -> None:
    ring = make_ring(tmp_path)
    step(ring, 1)
    ring.write_idle(True)
    listener = StoringListener(ring, Runs()).run_stream(rounds=40 if finished else 1)
    assert listener.rank.delivered is finished
    del ring
    listener.run_stream(rounds=5)
    assert listener.rank.reader.exit_reason is ExitReason.FINISHED
    assert (listener.instance.closed, listener.instance.reported_events) == ("FINISHED", [])
    assert listener.rank.done


@pytest.mark.integration
def test_its_recorder_leaves_and_another_one_delivers_what_follows(
    folder: Path, collector: FakeCollector, rank: Callable[..., RankProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_IDLE_SECONDS", 0.0)
    training = rank(world_size=1)
    training.do("steps", count=2)
    training.do("idle", idle=True)

    async def deliver(what: Callable[[Delivery], bool]) -> None:
        held = lock(folder)
        assert held is not None
        delivery = Delivery(folder, held, collector=collector.address, linger=0.5, empty=0.0)
        while not delivery.poll(time.monotonic()) and not what(delivery):
            await asyncio.sleep(POLL_SECONDS)
        assert what(delivery)
        await delivery.close()

    # Over: everything has been delivered, and nothing was for so long.
    asyncio.run(deliver(lambda delivery: delivery.poll(time.monotonic())))
    assert len(collector.told[FIRST].exits) == 1 and training.path.exists()
    training.do("idle", idle=False)
    training.do("steps", count=2)
    asyncio.run(deliver(lambda _: collector.position[FIRST] == 4))
    assert FIRST not in collector.closed
    training.do("leave", reason="FINISHED")
    asyncio.run(deliver(lambda delivery: delivery.empty))
    assert len(collector.told[FIRST].exits) == 2 and not training.path.exists()


@pytest.mark.parametrize("awaits_idle", [False, True])
def test_a_recorder_that_ranks_cannot_start_again_stays(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, awaits_idle: bool
) -> None:
    monkeypatch.setattr(ranks, "_IDLE_SECONDS", 0.0)
    step(ring, 1)
    ring.write_idle(True)

    async def over() -> bool:
        held = lock(ring.path.parent)
        assert held is not None
        delivery = Delivery(
            ring.path.parent, held, collector="127.0.0.1:9", linger=60.0, empty=0.0, awaits_idle=awaits_idle
        )
        delivery.poll(time.monotonic())
        try:
            return delivery.poll(time.monotonic() + 61.0)
        finally:
            await delivery.close()

    assert asyncio.run(over()) is not awaits_idle


def test_a_rank_is_idle_until_it_leaves(ring: Ring) -> None:
    one = Rank(ring.path)
    assert (one.idle, one.left) == (False, False)
    ring.write_idle(True)
    assert (one.idle, one.left) == (True, False)
    ring.write_exit(ExitReason.FINISHED)
    assert (one.idle, one.left) == (False, True)
