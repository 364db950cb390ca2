"""A wrong call, file or path costs its user one line, and is no trouble of the training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foreshock._cli import main
from foreshock_collector.commands.cli import diagnose, report
from foreshock_collector.config import misspelled_variables
from tests.support.commands import FORESHOCK


def exit_code(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the `foreshock` command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["foreshock", *arguments])
    try:
        return main()
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.integration
def test_the_command_exits_with_its_code() -> None:
    result = subprocess.run([*FORESHOCK, "status", "--nonsense"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["collector", "--grcp-port", "1"], "--grcp-port"),
        (["collector", "--http-port", "http"], "--http-port must be a whole number, not 'http'"),
        (["collector", "--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["collector", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["status", "--nonsense"], "--nonsense"),
        (["status", "--url", "http://127.0.0.1:9"], "no collector at http://127.0.0.1:9"),
        (["demo", "--seconds-per-step", "soon"], "--seconds-per-step"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_wrong_call_gets_one_line_and_exit_code_2(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grpc_port = 'x'", "grpc_port must be a whole number, not 'x'"),
        ("port = 1", "unknown setting 'port'"),
        ("[", "file.toml"),
        ("runs = 1", "runs must be tables by run"),
        ('[runs."llm-*"]\nspike_z = 8', "runs.llm-*: unknown rule spike_z"),
        ('[runs."llm-*".gradient]\nspike_z = "high"', "rule gradient.spike_z must be a number"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(
    tmp_path: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    assert exit_code(["collector", "--config", str(file)], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.integration
@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("--database", "", "cannot be written: Is a directory"),
        ("--ready-file", "nowhere/ready", "cannot be written: No such file or directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, setting: str, value: str, says: str) -> None:
    settings = {
        "--grpc-port": "0",
        "--http-port": "0",
        "--database": str(tmp_path / "db"),
        setting: f"{tmp_path}/{value}",
    }
    command = [*FORESHOCK, "collector", *(part for item in settings.items() for part in item)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert " ERROR cannot start: " in line
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"loss": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ('{"loss": 1' + "0" * 400 + "}", "not a number"),
        ('{"loss": {}}', "loss is '{}', not a number"),
        ('{"log_history": 7}', "log_history is not a list"),
        ("", "neither a loss nor a gradient norm"),
        ("loss\n", "no rows"),
        ("\0", "neither a loss nor a gradient norm"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line_and_no_trouble_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    for command in (diagnose, report):
        assert command([str(log)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_an_error_of_its_own_is_no_trouble_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock_collector.commands.replay.replay", lambda *_, **__: 1 / 0)
    log = tmp_path / "log.csv"
    log.write_text("loss\n1\n")
    assert diagnose([str(log)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"foreshock diagnose: {log}: internal error\nTraceback")
    assert said.endswith("ZeroDivisionError: division by zero\n")


def test_a_variable_that_is_nearly_a_setting_is_told_with_it_and_others_are_not() -> None:
    names = ["HTP_PORT", "DATABSE", "HOST", "CONFIG", "SERVICE_HOST", "SERVICE_PORT", "PORT_9327_TCP"]
    told = misspelled_variables(
        [*(f"FORESHOCK_COLLECTOR_{name}" for name in names), "FORESHOCK_COLLECTOR", "HTTP_PORTS"]
    )
    assert told == [
        f"FORESHOCK_COLLECTOR_{wrong} is not a setting and is ignored; did you mean FORESHOCK_COLLECTOR_{right}?"
        for wrong, right in (("DATABSE", "DATABASE"), ("HTP_PORT", "HTTP_PORT"))
    ]
