"""`foreshock demo`, as a newcomer runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.support.commands import FORESHOCK
from tests.support.waiting import eventually

COMMAND = [*FORESHOCK, "demo"]


def processes(mark: str) -> list[str]:
    """Command lines of all processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.timeout(400)
def test_the_three_acts_go_as_expected_with_alerts_and_leave_nothing_behind() -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "FORESHOCK_TEST_MARK": mark}
    shown = subprocess.run(
        [*COMMAND, "--seconds-per-step", "0.02"], env=environment, capture_output=True, text=True, timeout=380
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.count("as expected") == 3
    assert "ForeshockExplodingGradients" in shown.stdout
    assert "ForeshockSuddenNonFinite" in shown.stdout
    assert processes(mark) == []


def test_ctrl_c_ends_it_and_every_process_of_it() -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "FORESHOCK_TEST_MARK": mark}
    # A shell without job control starts what it puts in the background with SIGINT ignored, and children keep that.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *COMMAND],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Collector, torchrun, two ranks, recorder, Prometheus, Alertmanager.
    eventually(lambda: len(processes(mark)) >= 7, "all parts of the demo")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert processes(mark) == []
