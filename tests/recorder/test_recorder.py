"""A real recorder between real rings and a real gRPC server: nothing is lost that need not be, and it always leaves."""

from __future__ import annotations

import fcntl
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import LOCK_NAME
from foreshock_recorder.reader import RingReader
from tests.support.fake_collector import FakeCollector
from tests.support.rank_process import RankProcess, Start
from tests.support.rings import FIRST, SECOND, log_of, make_ring, step
from tests.support.waiting import WAIT_SECONDS, until

pytestmark = pytest.mark.integration

# -- a run in peace ----------------------------------------------------------------------------------------------------


def test_every_record_of_every_rank_arrives_in_order_and_nothing_stays_behind(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    process = recorder()
    for ring in rings:
        for sequence in range(1, 101):
            step(ring, sequence)
        ring.write_exit(ExitReason.FINISHED, "done")
    assert process.wait(WAIT_SECONDS) == 0
    for instance in (FIRST, SECOND):
        told = collector.told[instance]
        assert told.sequences() == list(range(1, 101))
        assert told.order[0] == "hello" and told.order[-1] == "exit"
        assert (told.exits[0].reason, told.exits[0].detail) == (pb.ExitReason.FINISHED, "done")
        assert told.exits[0].last_sequence == 100
    assert all(ring.acknowledged == 100 and ring.exit_acknowledged for ring in rings)
    assert not folder.exists()


def test_a_collector_that_takes_blocks_gets_one_message_for_all_ranks(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.schema_version = 2
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    process = recorder()
    for ring in rings:
        for sequence in range(1, 101):
            step(ring, sequence)
        ring.write_exit(ExitReason.FINISHED, "done")
    assert process.wait(WAIT_SECONDS) == 0
    assert not any(told.batches for told in collector.told.values())
    assert collector.position == {FIRST: 100, SECOND: 100}
    assert sum(block.steps * len(block.ranks) for block in collector.blocks) == 200
    assert all(told.order[0] == "hello" and told.order[-1] == "exit" for told in collector.told.values())
    assert all(ring.acknowledged == 100 and ring.exit_acknowledged for ring in rings)


def test_a_collector_of_the_first_version_that_takes_over_gets_batches(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    collector.schema_version = 2
    process = rank()
    recorder()
    process.do("steps", count=3)
    collector.wait_for(lambda: collector.position[FIRST] == 3)
    assert collector.blocks and not collector.told[FIRST].batches
    collector.stop()
    collector.schema_version = 0
    process.do("steps", count=3)
    collector.start()
    collector.wait_for(lambda: collector.position[FIRST] == 6)
    assert collector.told[FIRST].sequences()[-3:] == [4, 5, 6]


def test_a_rank_that_comes_later_is_found(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    rank().do("steps", count=1)
    recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 1)
    rank(rank=1).do("steps", count=1)
    collector.wait_for(lambda: bool(collector.told[SECOND].hellos))
    assert collector.streams == 1


def test_a_living_rank_without_steps_is_reported_again_and_again(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    rank()
    recorder()
    collector.wait_for(lambda: len(collector.told[FIRST].batches) >= 3)
    assert collector.told[FIRST].sequences() == []


def test_trouble_does_not_wait_for_a_slow_collectors_interval(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    collector.flow = pb.FlowControl(flush_interval_seconds=3600)
    process = rank()
    recorder()
    collector.wait_for(lambda: len(collector.told[FIRST].batches) == 1)
    process.do("steps", count=1)
    process.do("bad")
    collector.wait_for(lambda: collector.position[FIRST] == 2)
    assert math.isnan(collector.told[FIRST].batches[-1].global_norm[1])


def test_no_batch_is_larger_than_the_collector_asks_for(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.flow = pb.FlowControl(max_batch_steps=7)
    ring = make_ring(folder)
    for sequence in range(1, 101):
        step(ring, sequence)
    recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 100)
    assert max(len(batch.step) for batch in collector.told[FIRST].batches) == 7


def test_an_internal_error_of_the_probe_is_reported(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    process = rank()
    recorder()
    process.do("fail", note="KeyError: 'momentum'")
    collector.wait_for(lambda: bool(collector.told[FIRST].events))
    (event,) = collector.told[FIRST].events
    assert (event.kind, event.detail) == (pb.Event.PROBE_ERROR, "KeyError: 'momentum'")
    collector.wait_for(lambda: any(batch.dropped == {"probe_error": 1} for batch in collector.told[FIRST].batches))


def test_the_rank_sees_that_a_recorder_looks(folder: Path, recorder: Start) -> None:
    ring = make_ring(folder)
    recorder()
    until(lambda: ring.recorder_seen > 0)
    seen = ring.recorder_seen
    until(lambda: ring.recorder_seen > seen)


# -- ranks die ---------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_lost_its_last_steps_are_not(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    victim, process = rank(), recorder()
    victim.do("steps", count=3)
    collector.wait_for(lambda: collector.position[FIRST] == 3)
    victim.do("steps", count=2)
    victim.do("begin")
    victim.kill()
    assert process.wait(WAIT_SECONDS) == 0
    told = collector.told[FIRST]
    assert told.sequences() == [1, 2, 3, 4, 5, 6]
    assert [bool(flags & pb.INCOMPLETE) for batch in told.batches for flags in batch.flags] == [False] * 5 + [True]
    (event,), (goodbye,) = told.events, told.exits
    assert (event.kind, event.step) == (pb.Event.RANK_LOST, 106)
    assert (goodbye.reason, goodbye.last_sequence) == (pb.ExitReason.LOST, 6)
    assert told.order.index("event") < told.order.index("exit")
    assert not folder.exists()


def test_the_steps_of_a_rank_that_died_before_any_recorder_are_sent(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    victim = rank()
    victim.do("steps", count=40)
    victim.kill()
    assert recorder().wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == list(range(1, 41))
    assert collector.told[FIRST].exits[0].reason == pb.ExitReason.LOST


def test_what_was_overwritten_before_it_was_read_is_skipped(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    ring = make_ring(folder, slots=8)
    for sequence in range(1, 101):
        step(ring, sequence)
    ring.write_exit(ExitReason.FINISHED)
    assert recorder().wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == list(range(93, 101))


# -- recorders die -----------------------------------------------------------------------------------------------------


def test_after_a_killed_recorder_the_next_one_goes_on_where_it_was_acknowledged(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    collector.stores = 30
    process, first = rank(), recorder()
    process.do("steps", count=50)
    collector.wait_for(lambda: collector.told[FIRST].sequences()[-1:] == [50])
    until(lambda: RingReader(process.path).acknowledged == 30)
    first.kill()
    first.wait()
    process.do("steps", count=50)
    sent_before = len(collector.told[FIRST].sequences())
    collector.stores = 10**9
    second = recorder()
    process.do("leave", reason="DETACHED")
    assert second.wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences()[sent_before:] == list(range(31, 101))


def test_of_eight_recorders_that_start_at_once_one_stays(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    process = rank()
    started = [recorder() for _ in range(8)]
    until(lambda: sum(one.poll() is not None for one in started) >= 7)
    assert sorted(map(str, (one.poll() for one in started))) == ["0"] * 7 + ["None"]
    process.do("steps", count=1)
    collector.wait_for(lambda: collector.position[FIRST] == 1)
    assert collector.streams == 1


def test_ranks_that_look_for_a_recorder_do_not_keep_one_out(folder: Path, recorder: Start) -> None:
    ring = make_ring(folder)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    recorder()
    os.close(descriptor)
    until(lambda: ring.recorder_seen > 0)


def test_a_stopped_recorder_sends_what_there_is_and_leaves_the_living_to_the_next(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    collector.flow = pb.FlowControl(flush_interval_seconds=3600)
    process, first = rank(), recorder()
    collector.wait_for(lambda: len(collector.told[FIRST].batches) == 1)
    process.do("steps", count=5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == [1, 2, 3, 4, 5]
    assert not collector.told[FIRST].events and not collector.told[FIRST].exits
    process.do("steps", count=5)
    process.do("leave", reason="FINISHED")
    assert recorder().wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == list(range(1, 11))


# -- collectors fail ---------------------------------------------------------------------------------------------------


def test_a_collector_that_comes_late_gets_everything_and_the_rank_is_told_meanwhile(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.stop()
    ring = make_ring(folder)
    for sequence in range(1, 51):
        step(ring, sequence)
    recorder()
    until(lambda: ring.problem != "")
    assert ring.problem.startswith(f"{collector.address}: ")
    collector.start()
    collector.wait_for(lambda: collector.position[FIRST] == 50)
    assert collector.told[FIRST].sequences() == list(range(1, 51))
    until(lambda: ring.problem == "" and ring.acknowledged == 50)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_restarted_collector_gets_what_it_lacks(
    folder: Path, collector: FakeCollector, recorder: Start, forgets: bool
) -> None:
    ring = make_ring(folder)
    for sequence in range(1, 51):
        step(ring, sequence)
    process = recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 50)
    collector.stop()
    for sequence in range(51, 101):
        step(ring, sequence)
    before = [] if forgets else collector.told[FIRST].sequences()
    if forgets:
        collector.forget()
    collector.start()
    ring.write_exit(ExitReason.FINISHED)
    assert process.wait(WAIT_SECONDS) == 0
    told = collector.told[FIRST]
    assert told.sequences()[len(before) :] == list(range(1, 101) if forgets else range(51, 101))


def test_a_lost_rank_is_told_to_a_collector_that_was_away(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    process, victim = recorder, rank()
    running = process()
    collector.wait_for(lambda: bool(collector.told[FIRST].batches))
    collector.stop()
    victim.do("steps", count=2)
    victim.kill()
    collector.start()
    assert running.wait(WAIT_SECONDS) == 0
    assert [event.kind for event in collector.told[FIRST].events] == [pb.Event.RANK_LOST]
    assert collector.told[FIRST].sequences() == [1, 2]


def test_a_refusal_is_told_in_the_collectors_own_words(folder: Path, collector: FakeCollector, recorder: Start) -> None:
    collector.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "schema_version 1 is unknown: bring both up to date")
    ring = make_ring(folder)
    recorder()
    # Where our first word meets its refusal, gRPC may lose the text; the next stream brings it.
    until(lambda: "refused" in ring.problem)
    assert ring.problem == f"{collector.address}: refused: {collector.refusal[1]}"
    assert collector.refusal[1] in log_of(folder)


def test_after_the_last_rank_it_leaves_in_time_and_keeps_what_nobody_took(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.stop()
    ring = make_ring(folder)
    for sequence in range(1, 8):
        step(ring, sequence)
    ring.write_exit(ExitReason.FINISHED)
    assert recorder(linger=0.5).wait(WAIT_SECONDS) == 0
    assert f"7 records did not reach {collector.address}; a later recorder delivers them" in log_of(folder)
    collector.start()
    assert recorder().wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == list(range(1, 8))
    assert not folder.exists()


def test_a_collector_that_never_answers_does_not_keep_it(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.answers = False
    ring = make_ring(folder)
    step(ring, 1)
    ring.write_exit(ExitReason.FINISHED)
    assert recorder(linger=0.5).wait(WAIT_SECONDS) == 0
    assert "1 records did not reach" in log_of(folder)
