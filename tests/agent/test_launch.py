"""What a rank says of its recorder: only what is so, and once."""

from __future__ import annotations

import errno
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from foreshock import _log
from foreshock._output import new_ring, recorder_process
from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder import paths
from foreshock_recorder.folder import lock
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring
from tests.support.rings import identity, make_ring, step

PAGE = "http://monitor:9327/run/"
LATER = 1e9
"""Long after the last look."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "_logged", set())
    monkeypatch.setattr(recorder_process, "EXIT_SECONDS", 0.05)


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    ring = make_ring(tmp_path / "night" / "first")
    step(ring, 1)
    return ring


def process(ring: Ring, *, python: str = "/bin/false", logs: bool = True, run: str = "night") -> RecorderProcess:
    return RecorderProcess(ring.path.parent, run=run, collector="monitor:4327", python=python, logs=logs)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = list(caplog.messages)
    caplog.clear()
    return lines


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("night", f"run night: {PAGE}night"),
        ("night-2", f"run night-2: {PAGE}night-2; the name night is in use by another run"),
        ("n%2F%7B", f"run n/{{: {PAGE}n%2F%7B; the name night is in use by another run"),
    ],
)
def test_rank_0_says_once_where_the_runs_page_is_and_what_the_run_is_called(
    ring: Ring, caplog: pytest.LogCaptureFixture, address: str, line: str
) -> None:
    one, reader = process(ring), RingReader(ring.path)
    held = lock(ring.path.parent)
    assert held is not None
    one.check(ring, LATER)
    assert said(caplog) == []
    reader.write_page(PAGE + address)
    for again in (1, 2):
        one.check(ring, LATER + 10 * again)
    assert said(caplog) == [line]
    os.close(held)


def test_the_other_ranks_say_nothing_of_it(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    reader = RingReader(ring.path)
    reader.write_page(PAGE + "night")
    reader.write_problem("monitor:4327: connection refused")
    process(ring, logs=False).wait_for_exit(ring)
    assert said(caplog) == []


def test_a_job_too_short_for_a_look_hears_of_its_page_at_its_end(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    reader = RingReader(ring.path)
    reader.write_page(PAGE + "night")
    reader.acknowledge(1, exited=True)
    process(ring).wait_for_exit(ring)
    assert said(caplog) == [f"run night: {PAGE}night"]


@pytest.mark.parametrize("there", [False, True])
def test_a_recorder_goes_on_trying_only_where_there_is_one(
    ring: Ring, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    held = lock(ring.path.parent) if there else None
    process(ring).wait_for_exit(ring)
    what = "the recorder keeps trying, or" if there else "no recorder is running, so"
    assert said(caplog) == [
        f"1 records have not reached the collector yet; {what} a later job's recorder delivers them"
    ]
    if held is not None:
        os.close(held)


class Starting:
    """A recorder that leaves after a while, without the lock."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks else 1


def test_a_rank_waits_for_a_recorder_that_starts_and_for_none_that_has_gone(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_process, "EXIT_SECONDS", math.inf)
    one, recorder = process(ring), Starting(looks=3)
    one._processes.append(recorder)  # type: ignore[arg-type]
    one.wait_for_exit(ring)
    assert recorder.looks <= 0


def test_trouble_is_told_with_the_address_that_the_recorder_has(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    reader = RingReader(ring.path)
    reader.write_problem("typo:4327: connection refused")
    process(ring).wait_for_exit(ring)
    assert said(caplog) == ["the collector accepts no records; training continues (typo:4327: connection refused)"]


@pytest.mark.parametrize(("chosen", "number"), [(False, errno.ENOSPC), (True, errno.ENOSPC), (False, errno.EACCES)])
def test_where_shared_memory_is_full_the_ring_is_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: bool, number: int
) -> None:
    memory, allocate = tmp_path / "shm", os.posix_fallocate
    memory.mkdir()
    for module in (paths, new_ring):
        monkeypatch.setattr(module, "SHARED_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("FORESHOCK_RING_DIR", str(tmp_path / "chosen") if chosen else "")

    def refuse(*_: int) -> None:
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if chosen or number != errno.ENOSPC:
        with pytest.raises(OSError, match=os.strerror(number)):
            new_ring.new_ring("night", "first", 0, identity(), layers=2)
        return
    ring = new_ring.new_ring("night", "first", 0, identity(), layers=2)
    folder = tmp_path / "tmp" / f"foreshock-{os.getuid()}" / "night" / "first"
    assert ring.path.parent == folder and ring.path.stat().st_size == ring.layout.file_bytes
    assert said(caplog) == [f"shared memory is full, so the flight recorder is in {folder}"]
    assert not list(memory.rglob("*.ring")) and not list(memory.rglob("*.draft"))


@pytest.mark.integration
def test_a_recorder_that_cannot_be_started_is_told(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    process(ring, python="/nowhere/python").ensure()
    (line,) = said(caplog)
    assert line.startswith("the recorder cannot start; nothing reaches the collector (")


@pytest.mark.integration
def test_recorders_that_all_end_are_told(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    one = process(ring)
    for again in range(1, 6):
        one.check(ring, LATER + 10 * again)
    (line,) = said(caplog)
    assert line.startswith(
        "recorders keep exiting; nothing reaches the collector (try /bin/false -m foreshock_recorder"
    )
    assert str(ring.path.parent) in line


@pytest.mark.integration
def test_a_recorder_that_served_for_a_minute_does_not_count_against_the_next(
    ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    one, reader = process(ring), RingReader(ring.path)
    for again in range(1, 8):
        one.check(ring, LATER + 1000 * again)
        reader.heartbeat(time.monotonic() + 61)
    reader.heartbeat(2 * LATER)
    one.check(ring, 2 * LATER)
    assert said(caplog) == []


def test_no_recorder_is_started_beside_one_or_beside_a_side_car(ring: Ring) -> None:
    for folder in (ring.path.parent, ring.path.parent.parent):
        held = lock(folder)
        assert held is not None
        one = process(ring, python=sys.executable)
        one.ensure()
        assert not one._processes
        os.close(held)
