"""What the commands say to people and to scripts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock_collector.cli import incidents, status
from foreshock_collector.server import Server
from tests.collector.test_service import Stream, config, hello, serving, steps

FORESHOCK = [sys.executable, "-c", "import sys; from foreshock._cli import main; sys.exit(main())"]


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
def test_a_wrong_call_gets_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    result = subprocess.run([*FORESHOCK, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


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
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    command = [*FORESHOCK, "collector", "--config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_status_lists_runs_shows_one_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a/b c%2F<i>"

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(name), steps(1, [1.0, 2.0, float("nan")], run=name))
            await stream.stored(3)
            for arguments in ([], [name], ["--json", name], ["no such run"]):
                code = await asyncio.to_thread(status, ["--url", server.url, *arguments])
                answer = capsys.readouterr()
                if arguments == ["no such run"]:
                    assert (code, answer.out) == (2, "")
                    assert "there is no run 'no such run'" in answer.err
                    continue
                assert code == 0
                assert name in answer.out
                assert "sudden_nonfinite" in answer.out
                if "--json" in arguments:
                    assert json.loads(answer.out)["run"] == name
            await stream.close()

    serving(test())


def test_incidents_are_listed_and_told_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0, 2.0]))
            await stream.stored(2)
            assert await asyncio.to_thread(incidents, ["--url", server.url]) == 0
            assert capsys.readouterr().out == "no incidents\n"
            await stream.send(steps(3, [float("nan")]))
            await stream.stored(3)
            assert await asyncio.to_thread(incidents, ["--url", server.url, "--json"]) == 0
            (line,) = capsys.readouterr().out.splitlines()
            told = json.loads(line)
            assert (told["run"], told["verdict"]["cause"]) == ("r", "sudden_nonfinite")
            assert await asyncio.to_thread(incidents, ["--url", server.url, "r"]) == 0
            assert told["verdict"]["try"][0][:30] in capsys.readouterr().out
            await stream.close()

    serving(test())
