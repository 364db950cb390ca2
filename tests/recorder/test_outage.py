"""The collector is away for longer than a ring holds: what is left arrives, and what is not is counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from foreshock_collector.state.fleet import Runs
from foreshock_recorder.layout import MAX_SLOTS, ExitReason
from foreshock_recorder.ring import Ring
from tests.support.collector_process import Collector
from tests.support.listeners import Listener, StoringListener
from tests.support.rank_process import RankProcess, Start
from tests.support.rings import make_ring, step
from tests.support.waiting import eventually

LONG = 20_000


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path, world_size=1)


def write(ring: Ring, upto: int) -> None:
    for sequence in range(ring.begun + 1, upto + 1):
        step(ring, sequence)


@pytest.mark.parametrize("new_recorder", [False, True])
def test_what_a_ring_still_holds_arrives_and_what_it_overwrote_is_counted_once(ring: Ring, new_recorder: bool) -> None:
    write(ring, 100)
    listener = StoringListener(ring, Runs()).run_stream()
    # To let go of a ring's file in the process of its rank would be the rank's death.
    listeners = [listener]
    assert listener.counts() == (100, 0)
    for outage in (1, 2):
        write(ring, 100 + outage * LONG)
        if new_recorder:
            listener = StoringListener(ring, listener.runs)
            listeners.append(listener)
        listener.run_stream()
        assert listener.counts() == (100 + outage * LONG, outage * (LONG - MAX_SLOTS))
    ring.write_exit(ExitReason.FINISHED)
    listener.run_stream()
    assert listener.counts() == (100 + 2 * LONG, 2 * (LONG - MAX_SLOTS))
    assert listener.rank.delivered and listener.instance.closed == "FINISHED"
    assert listener.run.totals.counters["steps"] + listener.run.totals.dropped["ring_overrun"] == 100 + 2 * LONG


def test_records_under_way_when_the_ring_overwrote_them_do_not_hold_up_the_rest(ring: Ring) -> None:
    write(ring, MAX_SLOTS)
    listener = Listener(ring).greet()
    while listener.sequences(after=1.0):
        pass
    # Sent, and never acknowledged: the collector has gone.
    write(ring, LONG)
    listener.rank.restart_stream()
    listener.greet(position=0)
    sent = [n for _ in range(20) for n in listener.sequences(after=1.0)]
    assert sent == list(range(LONG - MAX_SLOTS + 1, LONG + 1))


def test_a_gap_at_the_very_end_is_closed_by_the_goodbye(ring: Ring) -> None:
    write(ring, 10)
    ring.memory[ring.measured_offset(10) - 8 * 10] ^= 1  # its first part is damaged: there is nothing to send
    ring.write_exit(ExitReason.FINISHED)
    listener = StoringListener(ring, Runs()).run_stream()
    assert listener.counts() == (10, 1)
    assert listener.rank.delivered


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Collector]:
    started = Collector(tmp_path)
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0


@pytest.mark.integration
@pytest.mark.parametrize("new_recorder", [False, True])
def test_a_run_is_running_again_after_20_000_steps_without_its_collector(
    monitor: Collector, recorder: Start, rank: Callable[..., RankProcess], folder: Path, new_recorder: bool
) -> None:
    address = ("--folder", str(folder), "--collector", monitor.address)
    process, running = rank(world_size=1), recorder(*address)
    process.do("steps", count=10)
    eventually(lambda: "crimson-otter" in monitor.names(), "the run")
    eventually(lambda: monitor.run("crimson-otter")["counters"]["steps"] == 10, "its steps")
    written = 10
    for outage in (1, 2):
        monitor.stop()
        if new_recorder:
            running.kill()
            running.wait()
        process.do("steps", count=LONG)
        written += LONG
        monitor.start()
        if new_recorder:
            running = recorder(*address)
        left = written - outage * (LONG - MAX_SLOTS)
        eventually(lambda: monitor.run("crimson-otter")["counters"]["steps"] == left, "what the ring holds")  # noqa: B023
        process.do("steps", count=1)
        written += 1
        eventually(lambda: monitor.run("crimson-otter")["counters"]["steps"] == left + 1, "the next step")  # noqa: B023
        seen = monitor.run("crimson-otter")
        assert seen["counters"]["dropped"]["ring_overrun"] == outage * (LONG - MAX_SLOTS)
        assert seen["ranks"][0]["last_step"] == 100 + written
        assert seen["condition"] == "running"
