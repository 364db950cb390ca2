"""A job ends while its collector is down: its records are kept, delivered later, or counted as given up."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.state.fleet import Runs
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import delivery, hand_in, orphans, recorder
from foreshock_recorder.folder import contents, lock
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.orphans import COUNTED_SECONDS, KEPT_SECONDS, give_up, launches
from foreshock_recorder.paths import LOCK_NAME, has_recorder
from foreshock_recorder.reader import RingReader
from foreshock_recorder.recorder import Recorder
from foreshock_recorder.ring import Ring
from tests.support.fake_collector import FakeCollector
from tests.support.listeners import StoringListener
from tests.support.rank_process import RankProcess, Start
from tests.support.rings import leave, make_ring, step
from tests.support.waiting import WAIT_SECONDS, eventually, free_port, until

DAY = KEPT_SECONDS


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    return tmp_path / "rings"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_ADOPT_SECONDS", 0.1)


def finishing(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_SECONDS))


async def serve(
    folder: Path, address: str, *, until: Callable[[], bool], linger: float = 20.0, records: int = 0
) -> None:
    """A recorder of a living rank in this process, until something holds; then its rank leaves."""
    ring = make_ring(folder, instance="living", run=folder.parent.name)
    held = lock(folder)
    assert held is not None
    one = Recorder(folder, held, collector=address, linger=linger)
    running = asyncio.create_task(one.run())
    while not until():
        assert not running.done()
        await asyncio.sleep(0.01)
    for sequence in range(1, records + 1):
        step(ring, sequence)
    ring.write_exit(ExitReason.FINISHED)
    assert await running == 0


@pytest.mark.integration
def test_what_a_job_left_is_handed_in_by_the_recorder_of_a_later_one(
    rings: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess], folder: Path
) -> None:
    old = leave(rings / "night" / "old", 50, acknowledged=10, instance="old", collector=collector.address)
    rank().do("leave", reason="FINISHED")
    collector.position["old"] = 10
    assert recorder().wait(WAIT_SECONDS) == 0
    told = collector.told["old"]
    assert told.sequences() == list(range(11, 51))
    assert told.hellos[0].exited and told.hellos[0].run == "night"
    assert told.exits[0].reason == pb.ExitReason.FINISHED
    assert not old.parent.parent.exists()


def test_a_collector_that_is_back_while_the_recorder_lingers_gets_what_its_job_left(
    rings: Path, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the pause that the recorder is in when the job ends."""
    failures = 0

    def an_hour(*_: Any, **__: Any) -> float:
        nonlocal failures
        failures += 1
        return 3600.0

    monkeypatch.setattr(delivery, "pause_seconds", an_hour)
    monkeypatch.setattr(random, "random", lambda: 0.01)
    collector.stop()

    def pausing() -> bool:
        if failures:
            collector.start()
        return failures > 0

    finishing(serve(rings / "day" / "new", collector.address, until=pausing, records=3))
    assert collector.told["living"].sequences() == [1, 2, 3]


@pytest.mark.usefixtures("eager")
def test_a_recorder_hands_in_what_others_left_while_its_own_ranks_live(rings: Path, collector: FakeCollector) -> None:
    for i in range(6):
        leave(rings / "night" / f"old-{i}", 5, instance=f"old-{i}", collector=collector.address)
    test = serve(
        rings / "day" / "new", collector.address, until=lambda: not (rings / "night").exists(), linger=WAIT_SECONDS
    )
    finishing(test)
    assert all(collector.told[f"old-{i}"].sequences() == [1, 2, 3, 4, 5] for i in range(6))


@pytest.mark.usefixtures("eager")
def test_records_go_to_the_address_that_their_own_job_was_told(rings: Path, collector: FakeCollector) -> None:
    other = FakeCollector().start()
    try:
        leave(rings / "night" / "old", 5, instance="old", collector=other.address)
        finishing(serve(rings / "day" / "new", collector.address, until=lambda: "old" in other.closed))
        assert "old" not in collector.told and "living" not in other.told
    finally:
        other.stop()


@pytest.mark.usefixtures("eager")
def test_a_job_that_starts_again_with_a_corrected_address_hands_in_what_the_wrong_one_kept(
    rings: Path, collector: FakeCollector
) -> None:
    leave(rings / "night" / "old", 5, instance="old", collector=f"127.0.0.1:{free_port()}")
    finishing(serve(rings / "night" / "new", collector.address, until=lambda: "old" in collector.closed))
    assert collector.told["old"].sequences() == [1, 2, 3, 4, 5]


@pytest.mark.integration
@pytest.mark.usefixtures("eager")
def test_a_job_started_again_is_not_served_by_the_recorder_of_its_last_launch(
    rings: Path, collector: FakeCollector, recorder: Start
) -> None:
    wrong = f"127.0.0.1:{free_port()}"
    leave(rings / "night" / "old", 5, instance="old", collector=wrong)
    lingering = recorder("--folder", str(rings / "night" / "old"), "--collector", wrong)
    until(lambda: has_recorder(rings / "night" / "old"))
    finishing(serve(rings / "night" / "new", collector.address, until=lambda: "living" in collector.told))
    assert lingering.poll() is None
    assert collector.told["living"].exits


@pytest.mark.usefixtures("eager")
def test_what_nobody_takes_neither_keeps_a_recorder_nor_is_lost(rings: Path, collector: FakeCollector) -> None:
    old = leave(rings / "night" / "old", 5, instance="old", collector=f"127.0.0.1:{free_port()}")
    finishing(serve(rings / "day" / "new", collector.address, until=lambda: "living" in collector.told, linger=0.5))
    found = contents(old.parent)
    assert found is not None and found.unacknowledged == 5
    held = lock(old.parent, patience=0.0)
    assert held is not None
    os.close(held)


@pytest.mark.integration
@pytest.mark.usefixtures("eager")
def test_what_has_a_recorder_or_a_living_rank_is_nobody_elses(rings: Path, collector: FakeCollector) -> None:
    held_folder, living = rings / "night" / "held", rings / "night" / "living"
    leave(held_folder, 5, instance="held", collector=collector.address)
    held = lock(held_folder)
    assert held is not None
    other = RankProcess(living, instance="other")
    asked = []
    real = orphans.orphans

    def counted(folders: set[Path]) -> list[Any]:
        asked.append(folders)
        return real(folders)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "orphans", counted)
        finishing(serve(rings / "day" / "new", collector.address, until=lambda: len(asked) > 3))
    assert set(collector.told) == {"living"}
    os.close(held)
    other.end()


def test_trouble_with_what_others_left_costs_the_own_ranks_nothing(
    rings: Path, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def broken(folders: set[Path]) -> list[Any]:
        asked.append(folders)
        if len(asked) > 1:
            raise OSError("stale file handle")
        return []

    monkeypatch.setattr(recorder, "_ADOPT_SECONDS", 0.1)
    monkeypatch.setattr(recorder, "orphans", broken)
    finishing(serve(rings / "day" / "new", collector.address, until=lambda: len(asked) > 3))
    assert collector.told["living"].exits


def test_what_another_user_left_is_left_to_that_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave(tmp_path / "night" / "old", 5)
    assert launches(tmp_path) == {path.parent}
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    assert launches(tmp_path) == set()


# -- limits ------------------------------------------------------------------------------------------------------------


def test_records_are_given_up_after_a_day_and_counted_once_by_the_collector(tmp_path: Path) -> None:
    path = leave(tmp_path / "night" / "old", 50, acknowledged=10, world_size=1)
    now = time.time()
    assert list(give_up(tmp_path, now=now + DAY - 60)) == []
    (line,) = give_up(tmp_path, now=now + DAY + 60)
    assert line == f"given up: 40 records of run night in {path.parent}"
    assert path.stat().st_size < 16 * 1024
    assert list(give_up(tmp_path, now=now + DAY + 120)) == []
    runs = Runs()
    ring = Ring.__new__(Ring)
    ring.path = path
    listener = StoringListener(ring, runs)
    listener.rank.restart_stream()
    (message,) = listener.ask()
    instance = runs.register(message.hello, 0.0)
    instance.position = 10
    listener.run_stream(rounds=5)
    assert listener.run.totals.dropped["given_up"] == 40
    assert listener.run.totals.dropped["ring_overrun"] == 0
    assert instance.closed == "FINISHED" and listener.rank.delivered


def test_the_oldest_are_given_up_where_they_take_too_much_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    paths = [leave(tmp_path / "night" / f"launch-{i}", 5) for i in range(4)]
    for i, path in enumerate(paths):
        os.utime(path, (now - 1000 + i, now - 1000 + i))
    monkeypatch.setattr(orphans, "KEPT_BYTES", 2 * paths[0].stat().st_size)
    assert len(list(give_up(tmp_path, now=now))) == 2
    assert [RingReader(path).given_up for path in paths] == [True, True, False, False]


def test_orphans_take_no_more_than_a_quarter_of_their_file_system(tmp_path: Path) -> None:
    system = os.statvfs(tmp_path)
    size = system.f_blocks * system.f_frsize
    assert orphans.max_bytes(tmp_path) == min(512 * 2**20, size / 4)


@pytest.mark.integration
def test_what_lives_is_never_given_up_whatever_its_size_and_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "KEPT_BYTES", 0)
    living = RankProcess(tmp_path / "night" / "living")
    held_ring = leave(tmp_path / "night" / "held", 5)
    held = lock(held_ring.parent)
    assert held is not None
    assert list(give_up(tmp_path, now=time.time() + 30 * DAY)) == []
    assert not RingReader(living.path).given_up and not RingReader(held_ring).given_up
    os.close(held)
    # Nor where it has come since somebody looked.
    old = leave(living.path.parent, 5, rank=1)
    assert orphans._cut(living.path.parent) == 5
    assert RingReader(old).given_up and not RingReader(living.path).given_up
    living.end()


def test_a_ring_that_is_handed_in_while_another_recorder_looks_at_it_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave(tmp_path / "night" / "old", 5)

    def opened(path: Path) -> RingReader:
        reader = RingReader(path)
        path.unlink()
        return reader

    monkeypatch.setattr("foreshock_recorder.folder.RingReader", opened)
    found = contents(path.parent)
    assert found is not None and found.unacknowledged == 5
    path.parent.rmdir()
    assert contents(path.parent) is None and launches(tmp_path) == set()


def test_the_counts_of_what_was_given_up_wait_a_week(tmp_path: Path) -> None:
    path = leave(tmp_path / "night" / "old", 5)
    now = time.time()
    assert len(list(give_up(tmp_path, now=now + DAY + 60))) == 1
    assert list(give_up(tmp_path, now=now + COUNTED_SECONDS - 60)) == []
    assert list(give_up(tmp_path, now=now + COUNTED_SECONDS + 60)) == [
        f"removed what was left of run night in {path.parent}"
    ]
    assert not (tmp_path / "night").exists()


def test_folders_without_a_ring_that_can_be_read_go_after_a_day_and_nothing_else(tmp_path: Path) -> None:
    dead, held, strange = tmp_path / "a" / "dead", tmp_path / "a" / "held", tmp_path / "b" / "strange"
    for folder in (dead, held):
        folder.mkdir(parents=True)
        (folder / LOCK_NAME).touch()
        (folder / "recorder.log").touch()
    (dead / "half.draft").touch()
    (dead / "odd.ring").touch()
    strange.mkdir(parents=True)
    (strange / "thesis.tex").touch()
    holder = lock(held)
    assert holder is not None
    now = time.time()
    assert list(give_up(tmp_path, now=now)) == []
    assert list(give_up(tmp_path, now=now + DAY + 60)) == [f"removed {dead}"]
    assert launches(tmp_path) == {held} and (strange / "thesis.tex").exists()
    os.close(holder)


def test_what_a_recorder_left_that_was_killed_behind_its_last_ring_goes_at_once(tmp_path: Path) -> None:
    killed, served, strange = tmp_path / "a" / "killed", tmp_path / "a" / "served", tmp_path / "b" / "strange"
    for folder in (killed, served, strange):
        folder.mkdir(parents=True)
        (folder / LOCK_NAME).touch()
        (folder / "recorder.log").touch()
    (strange / "thesis.tex").touch()
    holder = lock(served)
    assert holder is not None
    assert sorted(give_up(tmp_path, now=time.time())) == [f"removed {killed}", f"removed {strange}"]
    assert not killed.exists() and (served / LOCK_NAME).exists()
    # Of a stranger's folder, only files with our names go.
    assert [path.name for path in strange.iterdir()] == ["thesis.tex"]
    os.close(holder)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_hands_in_all_below_a_folder_and_says_so_in_a_line_a_run(
    rings: Path, collector: FakeCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    collector.renamed = {"day": "day-2"}
    leave(rings / "night" / "one", 5, instance="one", collector=collector.address)
    leave(rings / "night" / "two", 6, instance="two", collector=collector.address)
    leave(rings / "day" / "one", 1200, instance="three", collector=collector.address)
    assert hand_in.main(["--dir", str(rings)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run day: 1,200 records delivered, http://monitor:9327/run/day-2",
        "run night: 11 records delivered, http://monitor:9327/run/night",
    ]
    assert collector.told["three"].sequences() == list(range(1, 1201))
    assert not list(rings.rglob("*.ring"))
    assert hand_in.main(["--dir", str(rings)]) == 0
    assert capsys.readouterr().out == f"nothing to deliver below {rings}\n"


@pytest.mark.integration
def test_the_command_says_what_is_left_and_why(
    rings: Path, collector: FakeCollector, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_in, "_LINGER_SECONDS", 0.5)
    gone = f"127.0.0.1:{free_port()}"
    living = RankProcess(rings / "a" / "living", run="a")
    leave(rings / "b" / "away", 3, instance="away", collector=gone)
    held = lock(leave(rings / "c" / "held", 3).parent)
    assert held is not None
    collector.refused["refused"] = "world_size 3: this launch has reported 2 ranks before"
    leave(rings / "d" / "refused", 3, instance="refused", collector=collector.address)

    def answered() -> list[str]:
        assert hand_in.main(["--dir", str(rings)]) == 1
        lines = capsys.readouterr().out.splitlines()
        return [] if any(line.endswith("(no answer)") for line in lines) else lines

    a, b, c, d = eventually(answered, "an answer of each collector")
    assert a == "run a: 0 of 0 records delivered; its ranks are still running"
    assert b.startswith(f"run b: 0 of 3 records delivered; 3 are left ({gone}: ")
    assert c == "run c: 0 of 3 records delivered; another recorder is delivering them"
    why = f"{collector.address}: refused: {collector.refused['refused']}"
    assert d == f"run d: 0 of 3 records delivered; 3 are left ({why})"
    living.end()
    os.close(held)
    collector.refused.clear()
    assert hand_in.main(["--dir", str(rings), "--collector", collector.address]) == 0
    assert collector.told["away"].sequences() == [1, 2, 3]


@pytest.mark.integration
def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from foreshock._cli import main; main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "recorder", "--dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nothing to deliver below {tmp_path}\n"


@pytest.mark.parametrize(("arguments", "says"), [(["--collector", "monitor"], "'monitor' is not host:port")])
def test_a_wrong_call_is_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        hand_in.main(arguments)
    assert says in capsys.readouterr().err
