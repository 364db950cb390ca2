"""A rank that could not say goodbye: that it is gone is seen soon and in any container, and how it went."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import endings
from foreshock_recorder.delivery import POLL_SECONDS
from foreshock_recorder.endings import ProcessEnd, exit_of
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.process import start_ticks
from foreshock_recorder.ranks import _POLL_SECONDS, _STATUS_SECONDS, Rank
from foreshock_recorder.reader import RingReader
from tests.support.fake_collector import FakeCollector
from tests.support.rank_process import RankProcess, Start
from tests.support.rings import FIRST, make_ring, step
from tests.support.waiting import WAIT_SECONDS, until

Ranks = Callable[..., RankProcess]


def exited(code: int) -> int:
    return code << 8


@pytest.mark.parametrize(
    ("status", "facts", "said"),
    [
        (None, {}, (ExitReason.LOST, "")),
        (exited(3), {}, (ExitReason.LOST, "exit code 3")),
        (exited(0), {}, (ExitReason.LOST, "exit code 0")),
        (signal.SIGSEGV, {}, (ExitReason.LOST, "killed by SIGSEGV")),
        (signal.SIGABRT | 0x80, {}, (ExitReason.LOST, "killed by SIGABRT")),
        (signal.SIGKILL, {}, (ExitReason.LOST, "killed by SIGKILL")),
        (signal.SIGKILL, {"out_of_memory": True}, (ExitReason.LOST, "killed by SIGKILL, memory pressure?")),
        (signal.SIGSEGV, {"out_of_memory": True}, (ExitReason.LOST, "killed by SIGSEGV")),
        (40, {}, (ExitReason.LOST, "killed by signal 40")),
        (signal.SIGTERM, {}, (ExitReason.INTERRUPTED, "SIGTERM")),
        (signal.SIGINT, {}, (ExitReason.INTERRUPTED, "SIGINT")),
        (signal.SIGKILL, {"asked": True}, (ExitReason.INTERRUPTED, "SIGTERM")),
        (None, {"all_asked": True}, (ExitReason.INTERRUPTED, "SIGTERM")),
        (signal.SIGKILL, {"all_asked": True}, (ExitReason.INTERRUPTED, "SIGTERM")),
        (signal.SIGSEGV, {"all_asked": True}, (ExitReason.LOST, "killed by SIGSEGV")),
    ],
)
def test_what_is_known_of_a_ranks_end_is_said(
    status: int | None, facts: dict[str, bool], said: tuple[ExitReason, str]
) -> None:
    assert exit_of(status, **({"out_of_memory": False, "asked": False, "all_asked": False} | facts)) == said


ENDS = [
    (signal.SIGKILL, pb.ExitReason.LOST, "killed by SIGKILL"),
    (signal.SIGSEGV, pb.ExitReason.LOST, "killed by SIGSEGV"),
    (signal.SIGTERM, pb.ExitReason.INTERRUPTED, "SIGTERM"),
    (None, pb.ExitReason.LOST, "exit code 3"),
]


@pytest.mark.integration
@pytest.mark.parametrize(("number", "reason", "detail"), ENDS)
def test_a_ranks_end_is_told_with_its_signal_or_exit_code(
    collector: FakeCollector, recorder: Start, rank: Ranks, number: int | None, reason: int, detail: str
) -> None:
    victim, running = rank(), recorder()
    victim.do("steps", count=2)
    collector.wait_for(lambda: collector.position[FIRST] == 2)
    # Its parent, this test, has not waited for it yet.
    os.kill(victim.process.pid, number) if number else victim.tell("exit", code=3)
    collector.wait_for(lambda: bool(collector.told[FIRST].exits))
    told = collector.told[FIRST]
    assert (told.exits[0].reason, told.exits[0].detail) == (reason, detail)
    lost = [detail] if reason == pb.ExitReason.LOST else []
    assert [event.detail for event in told.events] == lost
    assert running.wait(WAIT_SECONDS) == 0


def test_a_rank_is_not_missed_for_longer_than_a_second() -> None:
    assert POLL_SECONDS + _POLL_SECONDS + _STATUS_SECONDS < 1.0


@pytest.mark.integration
def test_a_rank_whose_parent_was_faster_is_lost_and_nothing_is_made_up(tmp_path: Path, rank: Ranks) -> None:
    victim = rank()
    victim.kill()
    one = Rank(victim.path)
    one.poll(1000.0)
    assert (one.reader.exit_reason, one.reader.exit_detail) == (ExitReason.LOST, "")
    one.close()


@pytest.mark.integration
def test_a_parent_that_has_waited_for_its_child_leaves_its_status_to_newer_kernels() -> None:
    def ends(parent_first: bool) -> int | None:
        async def watched() -> int | None:
            child = subprocess.Popen(["sleep", "60"])
            ending = ProcessEnd(child.pid, start_ticks(child.pid) or 0)
            child.kill()
            if parent_first:
                child.wait()
            while ending.pending:
                await asyncio.sleep(0.01)
            child.wait()
            return ending.status

        return asyncio.run(watched())

    assert ends(parent_first=False) == signal.SIGKILL
    kernel = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    reaped = ends(parent_first=True)
    assert reaped == signal.SIGKILL or (reaped is None and kernel < (6, 15))


@pytest.mark.integration
def test_how_a_rank_ended_is_known_to_the_next_recorder_too(
    collector: FakeCollector, recorder: Start, rank: Ranks
) -> None:
    collector.stop()
    victim, first = rank(), recorder()
    victim.do("steps", count=1)
    until(lambda: RingReader(victim.path).pid > 0 and "refused" in problem(victim))
    os.kill(victim.process.pid, signal.SIGKILL)
    until(lambda: RingReader(victim.path).exit_reason is ExitReason.LOST)
    first.kill()
    first.wait()
    collector.start()
    recorder()
    collector.wait_for(lambda: bool(collector.told[FIRST].exits))
    assert collector.told[FIRST].exits[0].detail == "killed by SIGKILL"
    assert collector.told[FIRST].events[0].detail == "killed by SIGKILL"


def problem(rank: RankProcess) -> str:
    reader = RingReader(rank.path)
    return reader._read_text(512)


@pytest.mark.integration
@pytest.mark.parametrize(("stack", "reason"), [(b"", ExitReason.LOST), (b"Current thread\n", ExitReason.INTERRUPTED)])
def test_a_stack_that_was_left_behind_says_that_sigterm_had_come(
    rank: Ranks, stack: bytes, reason: ExitReason, collector: FakeCollector, recorder: Start
) -> None:
    victim = rank()
    left = victim.path.with_suffix(".stack")
    left.write_bytes(stack)
    victim.kill()
    assert recorder().wait(WAIT_SECONDS) == 0
    assert int(collector.told[FIRST].exits[0].reason) == reason
    assert not left.exists() and not left.parent.exists()


@pytest.mark.integration
def test_ranks_that_die_with_a_recorder_that_is_told_to_stop_were_interrupted(
    collector: FakeCollector, recorder: Start, rank: Ranks
) -> None:
    victim, running = rank(), recorder()
    collector.wait_for(lambda: bool(collector.told[FIRST].batches))
    running.send_signal(signal.SIGTERM)
    until(lambda: "asked to stop" in (victim.path.parent / "recorder.log").read_text())
    victim.kill()
    assert running.wait(WAIT_SECONDS) == 0
    (goodbye,) = collector.told[FIRST].exits
    assert (goodbye.reason, goodbye.detail) == (pb.ExitReason.INTERRUPTED, "SIGTERM")
    assert not collector.told[FIRST].events


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/job", "job/memory.events"), ("4:cpu,memory:/job", "memory/job/memory.oom_control")],
)
def test_a_kill_for_lack_of_memory_is_seen_in_either_version_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, file: str
) -> None:
    monkeypatch.setattr(endings, "_CGROUPS", tmp_path)
    account = tmp_path / file
    account.parent.mkdir(parents=True)
    account.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert endings._memory_accounts(f"1:name=systemd:/\n{line}\n") == [account]
    assert endings._oom_kills([account, tmp_path / "absent"]) == 2


@pytest.mark.integration
def test_a_rank_in_a_container_of_its_own_is_not_lost_while_it_lives(
    collector: FakeCollector, recorder: Start, rank: Ranks
) -> None:
    own = () if os.getuid() == 0 else ("--user", "--map-root-user")
    contained = rank(under=("unshare", *own, "--pid", "--fork", "--kill-child", "--mount-proc"))
    assert RingReader(contained.path).pid != contained.process.pid
    running = recorder()
    contained.do("steps", count=3)
    collector.wait_for(lambda: collector.position[FIRST] == 3)
    batches = len(collector.told[FIRST].batches)
    collector.wait_for(lambda: len(collector.told[FIRST].batches) >= batches + 2)
    assert not collector.told[FIRST].events
    contained.kill()
    assert running.wait(WAIT_SECONDS) == 0
    assert [event.kind for event in collector.told[FIRST].events] == [pb.Event.RANK_LOST]


def test_a_rank_that_said_goodbye_itself_keeps_its_word_however_it_dies(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    step(ring, 1)
    ring.write_exit(ExitReason.EXCEPTION, "ValueError: no more data")
    one = Rank(ring.path)
    del ring
    one.poll(1000.0)
    assert (one.reader.exit_reason, one.reader.exit_detail) == (ExitReason.EXCEPTION, "ValueError: no more data")
    one.close()
