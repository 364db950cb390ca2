"""A real recorder between real rings and a real gRPC server: nothing is lost that need not be, and it always leaves."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import stream
from foreshock_recorder.delivery import pause_seconds
from foreshock_recorder.folder import lock, release
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import LAYOUT_VERSION, LOCK_NAME, Farewell, has_recorder, ring_folder, run_folder
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, converse
from tests.agent.conftest import RankProcess, Start, until
from tests.agent.fake_collector import WAIT_SECONDS, FakeCollector, free_port
from tests.agent.rank import make_ring, step

FIRST, SECOND = "first-0-abcd", "first-1-abcd"


def log_of(folder: Path) -> str:
    path = folder / "recorder.log"
    return path.read_text() if path.exists() else ""


# -- a run in peace ----------------------------------------------------------------------------------------------------


def test_every_record_of_every_rank_arrives_in_order_and_nothing_stays_behind(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    process = recorder()
    for ring in rings:
        for sequence in range(1, 101):
            step(ring, sequence)
        ring.farewell(Farewell.FINISHED, "done")
    assert process.wait(WAIT_SECONDS) == 0
    for instance in (FIRST, SECOND):
        told = collector.told[instance]
        assert told.sequences() == list(range(1, 101))
        assert told.order[0] == "hello" and told.order[-1] == "goodbye"
        assert (told.goodbyes[0].reason, told.goodbyes[0].detail) == (pb.Goodbye.FINISHED, "done")
        assert told.goodbyes[0].last_sequence == 100
    assert all(ring.acknowledged == 100 and ring.acknowledged_farewell for ring in rings)
    assert not folder.exists()


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
    victim.do("launch")
    victim.kill()
    assert process.wait(WAIT_SECONDS) == 0
    told = collector.told[FIRST]
    assert told.sequences() == [1, 2, 3, 4, 5, 6]
    assert [bool(flags & pb.INCOMPLETE) for batch in told.batches for flags in batch.flags] == [False] * 5 + [True]
    (event,), (goodbye,) = told.events, told.goodbyes
    assert (event.kind, event.step) == (pb.Event.RANK_LOST, 106)
    assert (goodbye.reason, goodbye.last_sequence) == (pb.Goodbye.LOST, 6)
    assert told.order.index("event") < told.order.index("goodbye")
    assert not folder.exists()


def test_the_steps_of_a_rank_that_died_before_any_recorder_are_sent(
    collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    victim = rank()
    victim.do("steps", count=40)
    victim.kill()
    assert recorder().wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == list(range(1, 41))
    assert collector.told[FIRST].goodbyes[0].reason == pb.Goodbye.LOST


def test_what_was_overwritten_before_it_was_read_is_skipped(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    ring = make_ring(folder, slots=8)
    for sequence in range(1, 101):
        step(ring, sequence)
    ring.farewell(Farewell.FINISHED)
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
    process.do("farewell", reason="DETACHED")
    assert second.wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences()[sent_before:] == list(range(31, 101))


def test_of_two_recorders_one_stays(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    process = rank()
    both = [recorder(), recorder()]
    until(lambda: any(one.poll() is not None for one in both))
    assert sorted(map(str, (one.poll() for one in both))) == ["0", "None"]
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
    assert not collector.told[FIRST].events and not collector.told[FIRST].goodbyes
    process.do("steps", count=5)
    process.do("farewell", reason="FINISHED")
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
    until(lambda: ring.trouble != "")
    assert ring.trouble.startswith(f"{collector.address}: ")
    collector.start()
    collector.wait_for(lambda: collector.position[FIRST] == 50)
    assert collector.told[FIRST].sequences() == list(range(1, 51))
    until(lambda: ring.trouble == "" and ring.acknowledged == 50)


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
    ring.farewell(Farewell.FINISHED)
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
    until(lambda: "refused" in ring.trouble)
    assert ring.trouble == f"{collector.address}: refused: {collector.refusal[1]}"
    assert collector.refusal[1] in log_of(folder)


def test_after_the_last_rank_it_leaves_in_time_and_keeps_what_nobody_took(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.stop()
    ring = make_ring(folder)
    for sequence in range(1, 8):
        step(ring, sequence)
    ring.farewell(Farewell.FINISHED)
    assert recorder(linger=0.5).wait(WAIT_SECONDS) == 0
    assert f"7 records did not get to {collector.address}; a later recorder hands them in" in log_of(folder)
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
    ring.farewell(Farewell.FINISHED)
    assert recorder(linger=0.5).wait(WAIT_SECONDS) == 0
    assert "1 records did not get to" in log_of(folder)


# -- one stream --------------------------------------------------------------------------------------------------------


async def _say_hello(send: Send) -> None:
    await send(pb.FromRecorder(hello=pb.Hello(instance="i")))
    await asyncio.Event().wait()


def _ignore(_: pb.Ack) -> None: ...


def test_a_silent_collector_is_given_up(collector: FakeCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 0.2)
    collector.answers = False
    with pytest.raises(UnreachableError, match=r"no answer for 0\.2 s"):
        asyncio.run(converse(collector.address, _say_hello, _ignore))


def test_a_machine_that_swallows_everything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hole, pytest.raises(UnreachableError, match="no answer"):
        asyncio.run(converse(f"127.0.0.1:{hole.getsockname()[1]}", _say_hello, _ignore))


def test_a_collector_that_takes_nothing_in_is_given_up_with_little_in_memory(
    collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 1.0)
    sent = 0

    async def flood(send: Send) -> None:
        nonlocal sent
        while True:
            await send(pb.FromRecorder(hello=pb.Hello(instance="i", clip="x" * 2**20)))
            sent += 1

    collector.answers = False
    collector.hold()
    with pytest.raises(UnreachableError, match="no answer"):
        asyncio.run(converse(collector.address, flood, _ignore))
    assert sent < 64


def test_nobody_there_is_said_soon() -> None:
    with pytest.raises(UnreachableError, match=r"refused|failed to connect"):
        asyncio.run(converse(f"127.0.0.1:{free_port()}", _say_hello, _ignore))


def test_a_refusal_is_not_mistaken_for_a_failure(collector: FakeCollector) -> None:
    collector.refusal = (grpc.StatusCode.PERMISSION_DENIED, "this token is for another experiment")
    with pytest.raises(RefusedError, match="this token is for another experiment"):
        asyncio.run(converse(collector.address, _say_hello, _ignore))


def test_an_error_of_our_own_is_not_hidden(collector: FakeCollector) -> None:
    async def fail(_: Send) -> None:
        raise KeyError("rank")

    with pytest.raises(KeyError):
        asyncio.run(converse(collector.address, fail, _ignore))


def test_the_first_retry_is_soon_the_later_ones_are_spread_and_a_refusal_waits() -> None:
    assert pause_seconds(0, 0.999, refused=False) < 1
    assert [pause_seconds(n, 0.5, refused=False) for n in (0, 1, 3, 5, 10_000)] == [0.5, 1.0, 4.0, 15.0, 15.0]
    assert 15 <= pause_seconds(0, 0.0, refused=True) < pause_seconds(9, 0.999, refused=True) < 45


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_ring_of_another_version_is_left_alone_and_logged(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    stranger = make_ring(folder, 1)
    stranger.memory[8] = LAYOUT_VERSION + 1
    rank().do("steps", count=1)
    recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 1)
    assert len(re.findall(r"left alone: .*-rank-00001.ring is not a ring of layout", log_of(folder))) == 1
    assert stranger.path.exists() and SECOND not in collector.told


def test_a_side_car_waits_for_its_first_rank_and_leaves_after_the_last(
    tmp_path: Path, collector: FakeCollector, recorder: Start
) -> None:
    base = tmp_path / "elsewhere"
    process = recorder("--run", "night/1", "--ring-dir", str(base))
    run = run_folder("night/1", str(base))
    until(lambda: "for " in log_of(run))
    folder = ring_folder("night/1", "first", str(base))
    ring = make_ring(folder)
    assert has_recorder(folder)
    step(ring, 1)
    ring.farewell(Farewell.FINISHED)
    assert process.wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == [1]
    assert not run.exists()


def test_a_side_car_without_any_rank_leaves_when_told(folder: Path, recorder: Start) -> None:
    run = folder.parent
    process = recorder("--run", run.name, "--ring-dir", str(run.parent))
    until(lambda: "for " in log_of(run))
    until(lambda: handles_signals(process.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_SECONDS) == 0
    assert not run.exists()


def handles_signals(pid: int) -> bool:
    caught = re.search(r"^SigCgt:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_recorder_without_ranks_does_not_stay(folder: Path, recorder: Start) -> None:
    assert recorder().wait(WAIT_SECONDS) == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of the arguments --folder --run is required"),
        (["--folder", "x", "--run", "y"], "not allowed with"),
        (["--folder", "x", "--ring-dir", "y"], "argument --ring-dir: only with --run"),
        (["--run", ""], "a run has a name"),
        (["--folder", "x", "--collector", "monitor"], "'monitor' is not host:port"),
        (["--folder", "x", "--linger", "-1"], "'-1' is not a number of seconds"),
        (["--folder", "x", "--linger", "soon"], "soon"),
        (["--folder", "x", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foreshock_recorder", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_is_gone_is_no_lock(folder: Path) -> None:
    first = lock(folder)
    assert first is not None and lock(folder, patience=0.0) is None
    (folder / LOCK_NAME).unlink()
    second = lock(folder)
    assert second is not None
    os.close(first)
    assert lock(folder, patience=0.0) is None
    os.close(second)


def test_a_folder_that_is_released_is_left_to_a_rank_that_has_just_come(folder: Path) -> None:
    ring = make_ring(folder)
    held = lock(folder)
    assert held is not None
    release(folder, held)
    assert ring.path.exists() and (folder / LOCK_NAME).exists()
    held = lock(folder)
    assert held is not None
    # Not whole yet.
    draft = ring.path.rename(ring.path.with_suffix(".draft"))
    release(folder, held)
    assert draft.exists()
    held = lock(folder)
    assert held is not None
    draft.unlink()
    release(folder, held)
    assert not folder.exists()


def test_a_recorder_leaves_a_launch_to_a_side_car(folder: Path, recorder: Start) -> None:
    held = lock(folder.parent)
    assert held is not None
    ring = make_ring(folder)
    assert has_recorder(folder)
    assert recorder().wait(WAIT_SECONDS) == 0
    assert ring.recorder_seen == 0
    os.close(held)
    assert not has_recorder(folder)
