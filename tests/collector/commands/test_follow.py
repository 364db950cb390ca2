"""`foreshock diagnose --follow`: a log that is being written is watched as a live run is."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.cli import diagnose
from foreshock_collector.commands.follow import follow
from foreshock_collector.commands.logs import LogError
from tests.support.commands import FORESHOCK
from tests.support.logs import Log, explosion, healthy


def lines(log: Log) -> str:
    return "".join(f"step {step} loss {loss} grad_norm {norm}\n" for step, loss, norm in log)


def append(path: Path, text: str) -> Callable[[], object]:
    def write() -> None:
        with path.open("a") as file:
            file.write(text)

    return write


def watched(path: Path, *actions: Callable[[], object], given: dict[str, str] | None = None) -> int:
    """Follow a log. Each wait for more is one of the actions, and then Ctrl-C."""
    remaining = list(actions)

    def wait(seconds: float) -> None:
        assert seconds > 0
        if not remaining:
            raise KeyboardInterrupt
        remaining.pop(0)()

    code = follow(path, DEFAULT, given or {}, wait=wait)
    assert not remaining
    return code


def test_events_and_the_verdict_come_with_the_rows_that_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log, printed = tmp_path / "out.log", explosion(), list[str]()
    path.touch()

    def note() -> None:
        printed.append(capsys.readouterr().out)

    assert watched(
        path,
        append(path, "some settings\n" + lines(log[:60])),
        append(path, lines(log[60:124]) + "step 124 lo"),
        note,
        append(path, lines(log[124:125]).removeprefix("step 124 lo")),
        append(path, lines(log[125:127])),
        note,
    )
    calm, failed = printed
    assert "build-up of the norm" in calm
    assert "not finite" not in calm
    assert "step 126: not finite" in failed
    assert "exploding_gradients: Gradients exploded" in failed
    assert "  try: " in failed
    assert capsys.readouterr().out == ""


def test_a_healthy_log_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.log"
    path.write_text(lines(healthy(60)))
    assert watched(path, append(path, lines(healthy(120)[60:])), lambda: None) == 0
    assert capsys.readouterr().out == ""


def test_an_overflow_of_a_scaler_is_known_by_the_row_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log = tmp_path / "out.log", healthy()
    overflow = "step 60 loss 1.5 grad_norm inf\n"
    path.write_text(lines(log[:60]))
    assert watched(path, append(path, overflow), lambda: None, append(path, lines(log[61:]))) == 0
    assert "amp_overflow" in capsys.readouterr().out
    # Nothing follows: no scaler goes on after this one.
    path.write_text(lines(log[:60]) + overflow)
    assert watched(path, *[lambda: None] * 60) == 1
    assert "nonfinite_gradient" in capsys.readouterr().out


def test_a_second_failure_has_its_own_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.log"
    calm = [(200 + i, loss, norm) for i, loss, norm in healthy()]
    again = [(400 + i, loss, norm) for i, loss, norm in explosion()]
    path.write_text(lines([*explosion(), *calm, *again]))
    assert watched(path) == 1
    printed = capsys.readouterr().out
    assert printed.count("exploding_gradients:") == 2
    assert "recovered" in printed


def test_a_rotated_log_goes_on_and_a_truncated_one_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, log = tmp_path / "out.log", explosion()
    path.write_text(lines(log[:100]))

    def rotate() -> None:
        path.rename(tmp_path / "out.log.1")

    def truncate() -> None:
        os.truncate(path, 0)

    # With the history of the first file, the climb in the second one is a build-up.
    assert watched(path, rotate, append(path, lines(log[100:124])), lambda: None) == 1
    assert "build-up of the norm" in capsys.readouterr().out
    # Another training of other losses and norms is no spike of this one.
    other = [(step, 100 * loss, 100 * norm) for step, loss, norm in healthy()]
    path.write_text(lines(healthy()))
    assert watched(path, truncate, append(path, lines(other))) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("log.csv", "step,loss,grad_norm\n", "{},{},{}\n"),
        ("log.jsonl", "", '{{"step": {}, "loss": {}, "grad_norm": {}}}\n'),
    ],
)
def test_tables_and_json_are_followed_too(
    name: str, header: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    texts = [row.format(*each).replace("nan", "NaN") for each in explosion()]
    path.write_text(header)
    assert watched(path, append(path, "".join(texts[:90])), *(append(path, text) for text in texts[90:])) == 1
    assert "exploding_gradients: " in capsys.readouterr().out


def test_what_cannot_be_followed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "trainer_state.json"
    state.write_text('{\n "log_history": [\n')
    with pytest.raises(LogError, match="rewritten as a whole"):
        watched(state)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(LogError, match="found a, b"):
        watched(other)
    assert diagnose(["--follow", str(tmp_path / "missing.log")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert diagnose(["--follow", str(state), str(other)]) == 2
    assert "--follow watches one file" in capsys.readouterr().err


@pytest.mark.integration
def test_a_pipe_is_followed_to_its_end() -> None:
    command = [*FORESHOCK, "diagnose", "--follow", "--json", "-"]
    done = subprocess.run(command, input=lines(explosion()), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    found = [json.loads(line) for line in io.StringIO(done.stdout)]
    assert [each["kind"] for each in found if "kind" in each][-1] == "nonfinite"
    assert found[-1]["verdict"]["cause"] == "exploding_gradients"
