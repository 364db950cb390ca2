"""What the commands say to people and to scripts."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.commands.cli import incidents, report, status
from foreshock_collector.commands.client import ask
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.commands import FORESHOCK
from tests.support.streams import Stream, config, hello, serving, steps


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
                assert code == 1  # failing
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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "norm", "kinds", "condition", "code"),
    [
        (2.5, 3.25, ("", ""), "running", 0),
        (NAN, NAN, ("nan", "nan"), "failing", 1),
        (INF, 3.25, ("inf", ""), "failing", 1),
        (2.5, INF, ("", "inf"), "failing", 1),
    ],
)
def test_status_shows_the_newest_step_as_it_is_and_its_exit_code_says_whether_a_run_is_in_trouble(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loss: float,
    norm: float,
    kinds: tuple[str, str],
    condition: str,
    code: int,
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            observed: dict[str, Any] = {"flags": [pb.LOSS_OBSERVED] * 3}
            await stream.send(hello(), steps(1, [1.0, 2.0, norm], loss=[7.5, 8.5, loss], **observed))
            await stream.stored(3)
            found = await asyncio.to_thread(status, ["--url", server.url])
            answer = await asyncio.to_thread(ask, server.url, "runs")
            one = await asyncio.to_thread(ask, server.url, "runs", "r")
            await stream.close()
        row = capsys.readouterr().out.splitlines()[2].split()
        assert found == code
        assert row[:5] == [
            "r",
            condition,
            "2",
            *(kind or f"{v:g}" for kind, v in zip(kinds, (loss, norm), strict=True)),
        ]
        (brief,) = answer["runs"]
        assert brief["condition"] == condition
        for newest in (brief["newest"], one["newest"]):
            assert (newest["loss_nonfinite"], newest["gradient_nonfinite"]) == kinds
            assert newest["loss"] == (None if kinds[0] else loss)
            assert newest["global_norm"] == (None if kinds[1] else norm)

    serving(test())


def test_a_run_that_was_not_finite_is_still_said_to_be_so_after_a_restart_of_the_collector(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0, NAN]))
            await stream.stored(2)
            await stream.close()
        async with Server(config(tmp_path)) as server:
            answer = await asyncio.to_thread(ask, server.url, "runs", "r")
            assert answer["newest"]["gradient_nonfinite"] == "nan"
            assert answer["newest"]["global_norm"] is None

    serving(test())


def test_a_run_that_failed_and_left_is_failed_in_status_as_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            goodbye = pb.Exit(instance="r-0", reason=pb.ExitReason.EXCEPTION, last_sequence=2, detail="RuntimeError: x")
            await stream.send(hello(), steps(1, [1.0, NAN]), pb.FromRecorder(exit=goodbye))
            while not (await stream.call.read()).positions[0].closed:
                pass
            assert await asyncio.to_thread(status, ["--url", server.url, "r"]) == 1
            (brief,) = (await asyncio.to_thread(ask, server.url, "runs"))["runs"]
            await stream.close()
        assert brief["condition"] == "failed"
        assert capsys.readouterr().out.splitlines()[2].split()[1] == "failed"

    serving(test())


LONG = "gpt-350m-" + "-".join(f"part{number}" for number in range(12)) + "-end"


def on_a_terminal(arguments: list[str], *, columns: int) -> list[str]:
    """What the command writes to a terminal so wide, line by line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    plain = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    environment = plain | {"NO_COLOR": "1", "TERM": "xterm"}  # a dumb one has 80 columns whatever it says
    process = subprocess.Popen([*FORESHOCK, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    assert process.wait(60) in (0, 1)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()


@pytest.mark.integration
def test_long_names_fold_on_a_terminal_and_stay_whole_in_a_pipe(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(LONG), steps(1, [1.0, 2.0, NAN], run=LONG))
            await stream.stored(3)
            for command in ("status", "incidents"):
                call = [command, "--url", server.url]
                for columns in (80, 50):
                    lines = await asyncio.to_thread(on_a_terminal, call, columns=columns)
                    assert max(map(len, lines)) <= columns
                    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
                    cells = columns_of(lines)
                    assert {LONG, "sudden_nonfinite"} <= set(cells), (cells, lines)
                pipe = await asyncio.to_thread(
                    subprocess.run, [*FORESHOCK, *call], capture_output=True, text=True, timeout=60
                )
                (row,) = (line for line in pipe.stdout.splitlines() if LONG in line)
                assert "sudden_nonfinite" in row
                assert [line for line in pipe.stdout.splitlines() if line != line.rstrip()] == []
            await stream.close()

    serving(test())


def columns_of(lines: list[str]) -> list[str]:
    """The cells of a table of one row, each put together again from the lines it is folded over."""
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) <= set("\N{BOX DRAWINGS LIGHT HORIZONTAL} "))
    width = max(map(len, lines))
    blank = [all(line.ljust(width)[i] == " " for line in lines[:rule] + lines[rule + 1 :]) for i in range(width)]
    cells, current = list[str](), list[range]()
    start = None
    for i in [*range(width), width]:
        gap = i == width or blank[i]
        if not gap and start is None:
            start = i
        elif gap and start is not None:
            current.append(range(start, i))
            start = None
    for part in current:
        cells.append("".join(line.ljust(width)[part.start : part.stop].strip() for line in lines[rule + 1 :]))
    return cells


@pytest.mark.parametrize("command", [status, incidents, report])
def test_a_proxy_in_the_environment_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0]))
            await stream.stored(1)
            for name in ("no_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
            arguments = ["--url", server.url, "r", *(["--markdown"] if command is report else [])]
            assert await asyncio.to_thread(command, arguments) == 0
            assert capsys.readouterr().out
            monkeypatch.setenv("FORESHOCK_HTTP_PROXY", "1")
            assert await asyncio.to_thread(command, arguments) == 2
            await stream.close()

    serving(test())


@pytest.mark.parametrize(
    "name", ["exp-{seed}", "{'lr': 0.1}", "100%", "%2F", "a/b", "a b+c", "run?x=1#y", "Übung-试验", "<b>&amp;"]
)
def test_any_name_is_found_by_the_commands_the_api_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    quoted = urllib.parse.quote(name, safe="")

    def fetched(url: str, accept: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as response:
            return str(response.read().decode())

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(name), steps(1, [1.0, NAN], run=name))
            await stream.stored(2)
            assert await asyncio.to_thread(status, ["--url", server.url, name]) == 1
            assert await asyncio.to_thread(incidents, ["--url", server.url, name]) == 0
            assert await asyncio.to_thread(report, ["--url", server.url, name, "--markdown"]) == 0
            assert name in capsys.readouterr().out
            for path in ("", "/steps", "/series", "/heat/ranks", "/heat/layers", "/incidents/1"):
                assert json.loads(await asyncio.to_thread(fetched, f"{server.url}/api/v1/runs/{quoted}{path}", "*/*"))
            assert "<html" in await asyncio.to_thread(fetched, f"{server.url}/run/{quoted}", "text/html")
            await stream.close()

    serving(test())


def test_a_rank_whose_newest_gradient_is_not_finite_is_shown_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            flags: dict[str, Any] = {"flags": [pb.LOCAL_NORMS] * 2}
            await stream.send(
                hello(), steps(1, [1.0, NAN], local_norm=[1.5, NAN], local_nan_parameters=[0, 1], **flags)
            )
            await stream.stored(2)
            (rank,) = (await asyncio.to_thread(ask, server.url, "runs", "r"))["ranks"]
            assert (rank["local_norm"], rank["local_norm_nonfinite"]) == (None, "nan")
            await stream.send(steps(3, [2.0], local_norm=[2.5], flags=[pb.LOCAL_NORMS]))
            await stream.stored(3)
            (rank,) = (await asyncio.to_thread(ask, server.url, "runs", "r"))["ranks"]
            assert (rank["local_norm"], rank["local_norm_nonfinite"]) == (2.5, "")
            await stream.close()

    serving(test())
