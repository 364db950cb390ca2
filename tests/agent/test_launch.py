"""What a rank says of its recorder: only what is so, and once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from foreshock import _console, _launch
from foreshock._launch import RecorderProcess
from foreshock_recorder.folder import lock
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring
from tests.support.rings import make_ring, step

PAGE = "http://monitor:9327/run/"
LATER = 1e9
"""Long after the last look."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_console, "_said", set())
    monkeypatch.setattr(_launch, "FAREWELL_SECONDS", 0.05)


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    ring = make_ring(tmp_path / "night" / "first")
    step(ring, 1)
    return ring


def process(ring: Ring, *, python: str = "/bin/false", speaks: bool = True, run: str = "night") -> RecorderProcess:
    return RecorderProcess(ring.path.parent, run=run, collector="monitor:4327", python=python, speaks=speaks)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.removeprefix("foreshock: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("night", f"run night: {PAGE}night"),
        ("night-2", f"run night-2: {PAGE}night-2; the name night is in use by another run"),
        ("n%2F%7B", f"run n/{{: {PAGE}n%2F%7B; the name night is in use by another run"),
    ],
)
def test_rank_0_says_once_where_the_runs_page_is_and_what_the_run_is_called(
    ring: Ring, capsys: pytest.CaptureFixture[str], address: str, line: str
) -> None:
    one, reader = process(ring), RingReader(ring.path)
    held = lock(ring.path.parent)
    assert held is not None
    one.check(ring, LATER)
    assert said(capsys) == []
    reader.page(PAGE + address)
    for again in (1, 2):
        one.check(ring, LATER + 10 * again)
    assert said(capsys) == [line]
    os.close(held)


def test_the_other_ranks_say_nothing_of_it(ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    reader = RingReader(ring.path)
    reader.page(PAGE + "night")
    reader.trouble("monitor:4327: connection refused")
    process(ring, speaks=False).wait_for_farewell(ring)
    assert said(capsys) == []


def test_a_job_too_short_for_a_look_hears_of_its_page_at_its_end(
    ring: Ring, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = RingReader(ring.path)
    reader.page(PAGE + "night")
    reader.acknowledge(1, farewell=True)
    process(ring).wait_for_farewell(ring)
    assert said(capsys) == [f"run night: {PAGE}night"]


@pytest.mark.parametrize("there", [False, True])
def test_a_recorder_goes_on_trying_only_where_there_is_one(
    ring: Ring, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    held = lock(ring.path.parent) if there else None
    process(ring).wait_for_farewell(ring)
    what = "the recorder keeps trying, or" if there else "no recorder is running, so"
    assert said(capsys) == [
        f"1 records have not reached the collector yet; {what} a later job's recorder delivers them"
    ]
    if held is not None:
        os.close(held)


def test_trouble_is_told_with_the_address_that_the_recorder_has(ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    reader = RingReader(ring.path)
    reader.trouble("typo:4327: connection refused")
    process(ring).wait_for_farewell(ring)
    assert said(capsys) == ["the collector accepts no records; training continues (typo:4327: connection refused)"]


def test_a_recorder_that_cannot_be_started_is_told(ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    process(ring, python="/nowhere/python").ensure()
    (line,) = said(capsys)
    assert line.startswith("the recorder cannot start; nothing reaches the collector (")


def test_recorders_that_all_end_are_told(ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    one = process(ring)
    for again in range(1, 6):
        one.check(ring, LATER + 10 * again)
    (line,) = said(capsys)
    assert line.startswith(
        "recorders keep exiting; nothing reaches the collector (try /bin/false -m foreshock_recorder"
    )
    assert str(ring.path.parent) in line


def test_no_recorder_is_started_beside_one_or_beside_a_side_car(ring: Ring) -> None:
    for folder in (ring.path.parent, ring.path.parent.parent):
        held = lock(folder)
        assert held is not None
        one = process(ring, python=sys.executable)
        one.ensure()
        assert not one._processes
        os.close(held)
