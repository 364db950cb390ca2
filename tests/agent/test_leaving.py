"""How a rank leaves is told truly: finished, detached, by which exception or exit code, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreshock._output import leaving
from foreshock._output.leaving import Ending
from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.reader import RingReader
from tests.support.forked_jobs import ForkedJob, forking
from tests.support.repository import ROOT
from tests.support.rings import make_ring
from tests.support.torch_jobs import SCRIPTS

pytestmark = pytest.mark.integration

ENDINGS = {
    "ends": ("FINISHED", ""),
    "exit_0": ("FINISHED", ""),
    "exit_0_while_handling": ("FINISHED", ""),
    "exit_caught": ("FINISHED", ""),
    "old_error": ("FINISHED", ""),
    "exit_1": ("EXCEPTION", "exit code 1"),
    "exit_text": ("EXCEPTION", "exit code 1: no data left"),
    "exit_while_handling": ("EXCEPTION", "ValueError: bad batch"),
    "exit_while_interrupted": ("INTERRUPTED", "KeyboardInterrupt"),
    "raises": ("EXCEPTION", "ValueError: bad batch"),
    "device_failed": ("EXCEPTION", "ValueError: bad batch"),
    "device_hangs": ("EXCEPTION", "ValueError: bad batch"),
    "interrupted": ("INTERRUPTED", "KeyboardInterrupt"),
    "block": ("DETACHED", ""),
    "block_raises": ("EXCEPTION", "ValueError: bad batch"),
    "block_interrupted": ("INTERRUPTED", "KeyboardInterrupt"),
    "exit_after_detach": ("DETACHED", ""),
}
CODES = {"exit_1": 1, "exit_text": 1, "exit_while_handling": 1, "exit_while_interrupted": 1, "raises": 1}
CODES |= {"device_failed": 1, "device_hangs": 1}
CODES |= {"interrupted": -signal.SIGINT, "block_interrupted": -signal.SIGINT}


class Place:
    """Where scripts run, and leave their rings: there is no recorder that would take them away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {
            "FORESHOCK_RING_DIR": str(self.folder / "rings"), "FORESHOCK_COLLECTOR": "127.0.0.1:9",
            "FORESHOCK_RECORDER_PYTHON": "/bin/true", "FORESHOCK_STRICT": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self._forked: list[ForkedJob] = []

    def prompt(self, lines: str) -> str:
        """What an interactive interpreter answers to these."""
        command = [sys.executable, "-i"]
        done = subprocess.run(
            command, input=lines, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            check=False, env={**os.environ, **self._environment},
        )  # fmt: skip
        return done.stdout

    def leave(self, mode: str, *, ranks: int = 1) -> ForkedJob:
        """Fork ranks that leave in this way."""
        output = self.folder / f"{len(self._forked)}.txt"
        job = forking().start(
            SCRIPTS / "leaves.py", mode, str(self.folder),
            ranks=ranks, output=(output, output), environment=self._environment,
        )  # fmt: skip
        self._forked.append(job)
        return job

    def ring(self, mode: str, rank: int = 0) -> RingReader:
        """Of the newest run of this name."""
        rings = {p: RingReader(p) for p in (self.folder / "rings").rglob(f"*-rank-{rank:05d}.ring")}
        (found,) = [ring for ring in rings.values() if ring.identity["run"] == mode]
        return found

    def ready(self, mode: str, rank: int = 0) -> None:
        """Wait until it says so."""
        self.await_file(f"ready-{mode}-{rank}")

    def await_file(self, name: str) -> Path:
        deadline = time.monotonic() + 60
        while not (path := self.folder / name).exists() or (name == "pid" and not path.read_text()):
            assert time.monotonic() < deadline, f"{name} never came"
            time.sleep(0.01)
        return path

    def close(self) -> None:
        for job in self._forked:
            job.kill()
            job.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("leaving"))
    yield place
    place.close()


@pytest.fixture(scope="module")
def endings(place: Place) -> dict[str, tuple[int, str, str, bool]]:
    """Exit code of each script, its goodbye in two parts, and whether a file for its stack is left."""
    output, _ = place.leave(",".join(ENDINGS)).communicate(170)
    assert "foreshock/_" not in output, output
    found = {}
    for mode, code in json.loads(Path(place.folder, "codes.json").read_text()).items():
        ring = place.ring(mode)
        stack = ring.path.with_suffix(".stack").exists()
        found[mode] = code, ring.exit_reason.name, ring.exit_detail, stack
    return found


@pytest.mark.parametrize("mode", ENDINGS)
def test_a_goodbye_says_how_the_rank_left(endings: dict[str, tuple[int, str, str, bool]], mode: str) -> None:
    # And the process ends as it would have without Foreshock.
    assert endings[mode] == (CODES.get(mode, 0), *ENDINGS[mode], False)


def test_a_spawned_rank_says_which_exception_it_left_by(place: Place) -> None:
    job = place.leave("spawned_raises")
    job.wait(120)
    assert job.codes[job.pid] == 1
    ring = place.ring("spawned_raises", 1)
    assert (ring.exit_reason.name, ring.exit_detail) == ("EXCEPTION", "ValueError: bad batch")


def test_spawned_ranks_that_are_done_have_finished(place: Place) -> None:
    assert place.leave("spawned").wait(120) == 0
    assert [place.ring("spawned", rank).exit_reason.name for rank in (0, 1)] == ["FINISHED", "FINISHED"]


def test_an_error_at_a_prompt_is_not_the_end_of_the_run(place: Place) -> None:
    lines = (SCRIPTS / "leaves.py").read_text().split('if __name__ == "__main__":')[0]
    lines = lines.replace("from __future__ import annotations", "").replace("sys.argv[1]", "'prompt'")
    script = place.folder / "cell.py"
    script.write_text(lines.replace("sys.argv[2]", f"{str(place.folder)!r}"))
    cells = (
        f"exec(open({str(script)!r}).read())",
        "unknown_before",
        "model, optimizer, watch = begin(RANK, RANKS)",
        "steps(model, optimizer)",
        "unknown_after",
        "exit()",
    )
    output = place.prompt("\n".join((*cells, "")))
    assert output.count("NameError") == output.count("Traceback") == 2
    assert place.ring("prompt").exit_reason.name == "FINISHED"


def test_a_rank_in_a_collective_dies_at_once_of_sigterm_and_leaves_its_stack(place: Place) -> None:
    job = place.leave("collective", ranks=2)
    for rank in (0, 1):
        place.ready("collective", rank)
    ring = place.ring("collective")
    # It waits for the other's gradients.
    deadline = time.monotonic() + 60
    while ring.backward_passes < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert place.ring("collective", 1).backward_passes == 3
    os.kill(job.pid, signal.SIGTERM)
    # Which ends the other rank as well.
    job.wait(10)
    assert job.codes[job.pid] == -signal.SIGTERM
    assert ring.exit_reason.name == "NONE"
    stack = ring.path.with_suffix(".stack")
    assert "leaves.py" in stack.read_text() and stack.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", ["handler_before", "handler_after"])
def test_a_scripts_own_handler_of_sigterm_works_as_without_foreshock(place: Place, mode: str) -> None:
    job = place.leave(mode)
    place.ready(mode)
    os.kill(job.pid, signal.SIGTERM)
    job.wait(60)
    assert job.codes[job.pid] == 1
    ring = place.ring(mode)
    assert (ring.exit_reason.name, ring.exit_detail) == ("EXCEPTION", "exit code 1: asked to end")
    stack = ring.path.with_suffix(".stack")
    assert not stack.exists()


def test_sigterm_of_a_forked_worker_is_not_the_ranks(place: Place) -> None:
    job = place.leave("worker")
    place.ready("worker")
    ring = place.ring("worker")
    os.kill(int(place.await_file("pid").read_text()), signal.SIGTERM)
    assert job.wait(60) == 0
    assert ring.exit_reason.name == "FINISHED"


def test_a_training_that_has_ended_keeps_its_ring_no_longer_than_one_end_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "_unconfirmed", [])
    monkeypatch.setattr(leaving, "_ONE_END_SECONDS", 0.0)
    rings = []
    for number in range(3):
        ring = make_ring(tmp_path / "sweep" / str(number))
        recorder = RecorderProcess(ring.path.parent, run="sweep", collector="", python="/bin/true", logs=False)
        leaving.report(ring, recorder, Ending(ExitReason.FINISHED), wait=False)
        rings.append(weakref.ref(ring))
        del ring
    assert [ring() is None for ring in rings] == [True, True, False]


def test_an_error_of_before_is_not_kept_when_nobody_watches_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldError(Exception):
        """Its traceback would hold a model."""

    theirs, exits = sys.exit, leaving._Exits()
    error = OldError()
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    exits.watch()
    monkeypatch.undo()
    exits.let_go()
    assert sys.exit is theirs
    old = weakref.ref(error)
    del error
    assert old() is None
