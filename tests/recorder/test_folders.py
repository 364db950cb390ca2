"""Folders of rings: side-cars, locks, strangers, and wrong flags."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_recorder.__main__ import main
from foreshock_recorder.folder import lock, release
from foreshock_recorder.layout import LAYOUT_VERSION, ExitReason
from foreshock_recorder.paths import LOCK_NAME, has_recorder, ring_folder, run_folder
from tests.support.fake_collector import FakeCollector
from tests.support.rank_process import RankProcess, Start
from tests.support.rings import FIRST, SECOND, log_of, make_ring, step
from tests.support.waiting import WAIT_SECONDS, until


@pytest.mark.integration
def test_a_ring_of_another_version_is_left_alone_and_logged(
    folder: Path, collector: FakeCollector, recorder: Start, rank: Callable[..., RankProcess]
) -> None:
    stranger = make_ring(folder, 1)
    stranger.memory[8] = LAYOUT_VERSION + 1
    rank().do("steps", count=1)
    recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 1)
    assert len(re.findall(r"ignored: .*-rank-00001.ring is not a ring of layout", log_of(folder))) == 1
    assert stranger.path.exists() and SECOND not in collector.told


@pytest.mark.integration
def test_a_side_car_waits_for_its_first_rank_and_leaves_after_the_last(
    tmp_path: Path, collector: FakeCollector, recorder: Start
) -> None:
    base = tmp_path / "elsewhere"
    process = recorder("--run", "night/1", "--ring-dir", str(base))
    run = run_folder("night/1", str(base))
    until(lambda: "serving " in log_of(run))
    folder = ring_folder("night/1", "first", str(base))
    ring = make_ring(folder)
    assert has_recorder(folder)
    step(ring, 1)
    ring.write_exit(ExitReason.FINISHED)
    assert process.wait(WAIT_SECONDS) == 0
    assert collector.told[FIRST].sequences() == [1]
    assert not run.exists()


@pytest.mark.integration
def test_a_side_car_without_any_rank_leaves_when_told(folder: Path, recorder: Start) -> None:
    run = folder.parent
    process = recorder("--run", run.name, "--ring-dir", str(run.parent))
    until(lambda: "serving " in log_of(run))
    until(lambda: handles_signals(process.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_SECONDS) == 0
    assert not run.exists()


def handles_signals(pid: int) -> bool:
    caught = re.search(r"^SigCgt:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.integration
def test_a_recorder_without_ranks_does_not_stay(folder: Path, recorder: Start) -> None:
    assert recorder().wait(WAIT_SECONDS) == 0
    assert not folder.exists()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of the arguments --folder --run is required"),
        (["--folder", "x", "--run", "y"], "not allowed with"),
        (["--folder", "x", "--ring-dir", "y"], "argument --ring-dir: requires --run"),
        (["--run", ""], "argument --run: must not be empty"),
        (["--folder", "x", "--collector", "monitor"], "'monitor' is not host:port"),
        (["--folder", "x", "--linger", "-1"], "'-1' is not a number of seconds"),
        (["--folder", "x", "--linger", "soon"], "soon"),
        (["--folder", "x", "--color"], "unrecognized arguments: --color"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foreshock_recorder", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recorder_serves_no_folder_that_is_a_link(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "recorder.log").write_text("of somebody else")
    folder.parent.mkdir(parents=True)
    folder.symlink_to(other)
    assert main(["--folder", str(folder)]) == 1
    assert capsys.readouterr().err == f"foreshock_recorder: {folder} cannot be used: {folder} is not a folder\n"
    assert [path.name for path in other.iterdir()] == ["recorder.log"]
    assert (other / "recorder.log").read_text() == "of somebody else"


@pytest.mark.integration
def test_a_recorder_writes_its_log_through_no_link(
    folder: Path, tmp_path: Path, collector: FakeCollector, recorder: Start
) -> None:
    other = tmp_path / "other"
    other.write_text("of somebody else")
    ring = make_ring(folder)
    (folder / "recorder.log").symlink_to(other)
    (folder / "recorder.log.1").symlink_to(other)
    step(ring, 1)
    process = recorder()
    collector.wait_for(lambda: collector.position[FIRST] == 1)
    log = (folder / "recorder.log").lstat()
    assert stat.S_ISREG(log.st_mode) and stat.S_IMODE(log.st_mode) == 0o600
    assert "serving " in log_of(folder)
    ring.write_exit(ExitReason.FINISHED)
    assert process.wait(WAIT_SECONDS) == 0
    assert not folder.exists() and other.read_text() == "of somebody else"


@pytest.mark.parametrize("level", [0, 1])
def test_neither_rank_nor_recorder_uses_a_folder_that_another_user_has_made(
    folder: Path, level: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir(parents=True)
    taken = (folder, folder.parent)[level]
    if os.getuid() == 0:
        os.chown(taken, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: taken.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_ring(folder)
    assert main(["--folder", str(folder)]) == 1
    assert "belongs to another user" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


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


@pytest.mark.integration
def test_a_recorder_leaves_a_launch_to_a_side_car(folder: Path, recorder: Start) -> None:
    held = lock(folder.parent)
    assert held is not None
    ring = make_ring(folder)
    assert has_recorder(folder)
    assert recorder().wait(WAIT_SECONDS) == 0
    assert ring.recorder_seen == 0
    os.close(held)
    assert not has_recorder(folder)
