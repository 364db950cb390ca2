"""`foreshock doctor`: what each check finds, and what it advises."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from foreshock import _training_facts
from foreshock_recorder.doctor import command, machine
from foreshock_recorder.doctor.clock import apart, clock, http_address
from foreshock_recorder.doctor.collector import answers
from foreshock_recorder.doctor.finding import Finding, Level, exit_code, lines, ok, warn
from foreshock_recorder.doctor.training import findings, training
from foreshock_recorder.folder import contents
from foreshock_recorder.layout import MAX_RING_BYTES
from foreshock_recorder.paths import SHARED_MEMORY
from tests.support.fake_collector import FakeCollector
from tests.support.repository import ROOT
from tests.support.rings import leave
from tests.support.waiting import WAIT_SECONDS, free_port

FACTS: dict[str, Any] = {
    "torch": "2.13.0+cu130", "torch_error": "", "devices": ["NVIDIA H100"] * 2, "devices_error": "",
    "cuda_built": True, "fused": ["Adam", "SGD"], "triton": "3.7.0", "compiler": True, "settings_error": "",
    "unknown": [], "disabled": False,
}  # fmt: skip


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check ends by its answer, however slow the machine is."""
    for name in ("collector._SECONDS", "clock._SECONDS", "clock._APART_SECONDS", "machine._RECORDER_SECONDS"):
        monkeypatch.setattr(f"foreshock_recorder.doctor.{name}", WAIT_SECONDS)
    monkeypatch.setattr("foreshock_recorder.doctor.training._SECONDS", 2 * WAIT_SECONDS)


def levels(found: list[Finding]) -> dict[str, Level]:
    return {each.check: each.level for each in found}


def test_an_environment_with_everything_is_ok() -> None:
    found = findings(FACTS)
    assert list(levels(found)) == ["torch", "devices", "triton", "optimizers", "settings"]
    assert set(levels(found).values()) == {Level.OK} and exit_code(found) == 0
    assert "2: NVIDIA H100" in lines(found)[1]


@pytest.mark.parametrize(
    ("change", "check", "level", "text"),
    [
        ({"torch_error": "ImportError: libcudart.so"}, "torch", Level.FAIL, "libcudart.so"),
        ({"torch": "2.9.1"}, "torch", Level.WARN, "2.9.1 is older"),
        ({"devices": []}, "devices", Level.WARN, "finds no device"),
        ({"devices": [], "cuda_built": False}, "devices", Level.OK, "the CPU"),
        ({"devices": [], "devices_error": "RuntimeError: CUDA"}, "devices", Level.FAIL, "RuntimeError: CUDA"),
        ({"triton": ""}, "triton", Level.WARN, "not installed"),
        ({"compiler": False}, "triton", Level.WARN, "no C compiler"),
        ({"devices": [], "triton": ""}, "triton", Level.OK, "not needed"),
        ({"fused": []}, "optimizers", Level.WARN, "none can be fused"),
        ({"settings_error": "FORESHOCK_CLIP: no"}, "settings", Level.FAIL, "FORESHOCK_CLIP"),
        ({"unknown": ["FORESHOCK_CLIPS is not one"]}, "settings", Level.WARN, "FORESHOCK_CLIPS"),
        ({"disabled": True}, "settings", Level.WARN, "nothing is watched"),
    ],
)
def test_what_is_missing_for_training_is_found_and_has_advice(
    change: dict[str, Any], check: str, level: Level, text: str
) -> None:
    found = findings(FACTS | change)
    (one,) = (each for each in found if each.check == check)
    assert one.level is level and text in one.text and bool(one.advice) == (level is not Level.OK)
    assert exit_code(found) == int(level is Level.FAIL)


def test_an_error_of_cuda_is_one_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> str:
        raise RuntimeError("CUDA error: out of memory\nFor debugging consider CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    facts = _training_facts.facts()
    assert facts["devices_error"] == "RuntimeError: CUDA error: out of memory" and facts["devices"] == []
    assert facts["torch"] == torch.__version__ and facts["torch_error"] == "" and "Adam" in facts["fused"]
    assert facts.keys() == FACTS.keys()


@pytest.mark.parametrize(
    ("installed", "chosen", "found"),
    [
        (["gcc"], None, True),
        (["clang"], None, True),
        ([], None, False),
        (["gcc", "icx"], "icx", True),
        (["gcc"], "icx", False),
        # Triton starts a program with this name.
        (["gcc", "ccache"], "ccache gcc", False),
    ],
)
def test_a_compiler_is_found_where_triton_finds_it(
    installed: list[str], chosen: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in installed:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CC", chosen)
    assert _training_facts.has_compiler() is found


def test_a_line_has_its_advice_below_it() -> None:
    assert lines([ok("proxy", "none"), warn("clock", "off", "set it")]) == [
        "ok   proxy          none",
        "warn clock          off",
        "                    set it",
    ]


@pytest.mark.parametrize(
    ("free", "in_memory", "level", "advice"),
    [
        (8 * MAX_RING_BYTES, True, Level.OK, ""),
        (8 * MAX_RING_BYTES - 1, True, Level.WARN, "--shm-size"),
        (8 * MAX_RING_BYTES, False, Level.WARN, "FORESHOCK_RING_DIR"),
        (0, False, Level.WARN, "free some"),
    ],
)
def test_rings_need_room_in_shared_memory(free: int, in_memory: bool, level: Level, advice: str) -> None:
    found = machine.room(free, SHARED_MEMORY / "foreshock-0", in_memory=in_memory)
    assert found.level is level and advice in found.advice


def test_a_folder_that_cannot_hold_rings_is_named(tmp_path: Path) -> None:
    assert machine.folder_of_rings(tmp_path / "new" / "deeper").level is Level.OK
    (tmp_path / "file").touch()
    found = machine.folder_of_rings(tmp_path / "file" / "rings")
    assert found.level is Level.FAIL and "file is not a folder" in found.text


def test_a_folder_that_this_user_may_not_search_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, access = os.stat, os.access

    def refuse_stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if isinstance(path, (str, Path)) and tmp_path in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    # The superuser may search every folder.
    monkeypatch.setattr(os, "stat", refuse_stat)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    rings = tmp_path / "locked" / "rings"
    monkeypatch.setenv("FORESHOCK_RING_DIR", str(rings))
    found = machine.folder_of_rings(rings)
    assert found.level is Level.FAIL and found.text == f"{tmp_path} is not writable"
    assert "MiB free" in machine.shared_memory(rings).text
    assert machine.launches() == []


def test_records_that_no_collector_has_are_counted_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path / "night" / "first", 50, acknowledged=10, instance="one", collector="127.0.0.1:9")
    leave(tmp_path / "day" / "first", 5, acknowledged=5, instance="two", collector="127.0.0.1:9")
    found = [contents(tmp_path / run / "first") for run in ("night", "day")]
    left = machine.rings_left([each for each in found if each is not None])
    assert left.level is Level.WARN and left.text.startswith("40 records") and left.text.endswith(": night")
    assert machine.rings_left([each for each in found[1:] if each is not None]).level is Level.OK
    monkeypatch.setenv("FORESHOCK_RING_DIR", str(tmp_path))
    assert [each.run for each in machine.launches()] == ["day", "night"]


@pytest.mark.parametrize(
    ("environment", "level", "text"),
    [
        ({}, Level.OK, "none"),
        ({"HTTP_PROXY": "http://p"}, Level.OK, "HTTP_PROXY is ignored"),
        ({"https_proxy": "http://p", "FORESHOCK_HTTP_PROXY": "1"}, Level.OK, "used, from https_proxy"),
        ({"FORESHOCK_HTTP_PROXY": "1"}, Level.WARN, "no proxy is set"),
    ],
)
def test_a_proxy_is_named(environment: dict[str, str], level: Level, text: str) -> None:
    found = machine.proxy(environment)
    assert found.level is level and text in found.text


@pytest.mark.parametrize(
    ("missing", "environment", "level"),
    [
        ("grpcio", {}, Level.FAIL),
        ("grpcio", {"FORESHOCK_RECORDER_PYTHON": "/other/bin/python"}, Level.OK),
        ("foreshock", {"FORESHOCK_RECORDER_PYTHON": "/other/bin/python"}, Level.FAIL),
        ("", {"FORESHOCK_RECORDER_PYTHON": "/other/bin/python"}, Level.OK),
    ],
)
def test_a_recorder_of_another_environment_has_its_own_packages(
    missing: str, environment: dict[str, str], level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == missing:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(machine, "version", version)
    found = machine.versions(environment)
    assert found.level is level
    assert (f"{missing} is not installed" in found.text) is (level is Level.FAIL)
    assert ("grpcio 1.0" in found.text) is (missing == "")


def test_without_grpc_the_collector_is_not_checked_and_the_clock_is(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"versions": ok("versions", ""), "training": [], "recorder": ok("recorder", "")}
    for name, result in results.items():
        monkeypatch.setattr(command, name, lambda *_, result=result: result)
    monkeypatch.setattr(command, "clock", lambda url: ok("clock", url))
    monkeypatch.delitem(sys.modules, "foreshock_recorder.doctor.collector")
    monkeypatch.setitem(sys.modules, "grpc", None)
    *_, collector, clock = command.checks("monitor:4327")
    assert collector.check == "collector" and collector.level is Level.WARN and "grpc" in collector.text
    assert clock.check == "clock" and clock.text.endswith("monitor:9327")


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
def test_an_interpreter_that_cannot_train_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho starting >&2\necho 'Illegal instruction' >&2\nexit 132\n")
    broken.chmod(0o755)
    texts = {"false": "printed no facts: exit code 1", str(broken): "printed no facts: Illegal instruction"}
    texts[str(tmp_path / "none")] = "does not run"
    for python, text in texts.items():
        (found,) = training(python)
        assert found.check == "torch" and found.level is Level.FAIL and f"{python} {text}" in found.text


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
def test_an_interpreter_without_the_recorder_is_found(tmp_path: Path) -> None:
    assert machine.recorder(sys.executable).level is Level.OK
    assert machine.recorder("false").level is Level.FAIL
    assert machine.recorder(str(tmp_path / "none")).level is Level.FAIL


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
def test_a_collector_that_answers_refuses_or_is_not_there(collector: FakeCollector) -> None:
    assert asyncio.run(answers(collector.address)).level is Level.OK
    collector.refusal = (grpc.StatusCode.UNAUTHENTICATED, "a token is needed")
    refused = asyncio.run(answers(collector.address))
    assert refused.level is Level.FAIL and "a token is needed" in refused.text and "TOKEN_FILE" in refused.advice
    missing = asyncio.run(answers(f"127.0.0.1:{free_port()}"))
    assert missing.level is Level.FAIL and "does not answer" in missing.text


@pytest.mark.integration
def test_a_token_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_TOKEN_FILE", "/none")
    found = asyncio.run(answers("127.0.0.1:9"))
    assert found.level is Level.FAIL and "FORESHOCK_TOKEN_FILE: /none cannot be read" in found.text


class Healthy(BaseHTTPRequestHandler):
    """Answers as a collector does: with the date."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
def test_clocks_are_compared_by_the_collectors_answer(url: str) -> None:
    assert clock(url) == ok("clock", "same as the collector's")
    assert clock(f"http://127.0.0.1:{free_port()}").level is Level.WARN
    assert "monitor:9327 is not an HTTP address" in clock("monitor:9327").text


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("asked", "answered", "level"), [(-86400, 86400, Level.OK), (-86400, -86400, Level.WARN)])
def test_a_slow_answer_does_not_set_the_clocks_apart(
    asked: int, answered: int, level: Level, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([time.time() + asked, time.time() + answered])
    monkeypatch.setattr("foreshock_recorder.doctor.clock.time", SimpleNamespace(time=times.__next__))
    assert clock(url).level is level


@pytest.mark.parametrize(
    ("seconds", "level", "text"),
    [(4.0, Level.OK, ""), (90.0, Level.WARN, "90 s ahead of"), (-3600.0, Level.WARN, "3,600 s behind")],
)
def test_clocks_that_differ_are_found(seconds: float, level: Level, text: str) -> None:
    found = apart(seconds, "the collector's")
    assert found.level is level and text in found.text and found.text.endswith("the collector's")


def test_the_address_of_the_page_follows_from_that_of_the_stream() -> None:
    assert http_address("monitor:4327", {}) == "http://monitor:9327"
    assert http_address("[::1]:4327", {"FORESHOCK_CA_FILE": "ca.pem"}) == "https://[::1]:9327"
    assert http_address("monitor:4327", {"FORESHOCK_URL": "http://other:1"}) == "http://other:1"


@pytest.mark.integration
@pytest.mark.usefixtures("patient")
def test_the_command_prints_every_check_and_exits_with_1_if_one_failed(
    collector: FakeCollector,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORESHOCK_RING_DIR", str(tmp_path / "rings"))
    monkeypatch.setenv("FORESHOCK_URL", url)
    monkeypatch.setenv("FORESHOCK_CLIP", "one")
    monkeypatch.chdir(tmp_path)
    for name in ("torch.py", "grpc.py"):
        (tmp_path / name).write_text("raise RuntimeError('of the current folder')")
    assert command.main(["--json", "--collector", collector.address]) == 1
    found = {each["check"]: each for each in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == [
        "versions", "torch", "devices", "triton", "optimizers", "settings", "rings", "shared memory", "left behind",
        "recorder", "proxy", "collector", "clock",
    ]  # fmt: skip
    assert [name for name, each in found.items() if each["level"] == "fail"] == ["settings"]
    assert "FORESHOCK_CLIP" in found["settings"]["text"] and found["clock"]["level"] == "ok"


def test_a_wrong_address_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--collector", "monitor"])
    assert ended.value.code == 2 and "is not host:port" in capsys.readouterr().err


def test_options_of_the_collectors_machine_belong_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--prometheus-url", "http://127.0.0.1:9090"])
    assert ended.value.code == 2 and "foreshock doctor collector" in capsys.readouterr().err


def test_the_collectors_package_has_the_checks_of_its_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["foreshock.doctor"]
    entry = EntryPoint("collector", declared["collector"], "foreshock.doctor")
    monkeypatch.setattr(command, "entry_points", lambda **_: [entry])
    monkeypatch.setenv("FORESHOCK_COLLECTOR_HTTP_PORT", "none")
    assert command.main(["collector"]) == 1
    assert "fail settings       --http-port must be a whole number" in capsys.readouterr().out
    monkeypatch.setattr(command, "entry_points", lambda **_: [])
    assert command.main(["collector"]) == 1
    assert "no collector" in capsys.readouterr().out
