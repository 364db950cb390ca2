"""Lists of runs, the commands and the page show runs that have left memory as any other."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from foreshock_collector.commands.cli import incidents, status
from foreshock_collector.server import Server
from foreshock_collector.state import fleet
from foreshock_collector.state.summary import summary_of
from foreshock_collector.web import api
from tests.support.clock import Clock
from tests.support.ended_runs import DAY, Collector, with_ten_ended_runs
from tests.support.streams import config, families, hello, serving, value

KEPT = 3


@pytest.fixture(autouse=True)
def few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ENDED_KEPT", KEPT)


@pytest.fixture
def errors_expected() -> None:
    """A request that fails is logged as an error."""


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    return with_ten_ended_runs(tmp_path / "db")


def test_lists_show_a_run_that_left_memory_as_they_did_before(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "db", Clock())
    collector.run("whole")
    collector.run("nan", norm=math.nan)
    collector.run("killed", reason="EXCEPTION", detail="RuntimeError: x")
    collector.run("stopped", reason="INTERRUPTED")
    # It ends with os._exit(0), which only its recorder notices.
    collector.run("left", reason="LOST", detail="exit code 0")
    collector.intake.apply(hello("silent", launch_id="first", instance="silent-first"), collector.session)
    for _ in range(5):
        collector.clock.now += 1
        collector.intake.commit()
    for _ in range(2):
        collector.wait(901)
    before = collector.listed()
    conditions = {run["run"]: (run["condition"], run["verdict"]) for run in before["runs"]}
    assert conditions == {
        "whole": ("ended", "healthy"),
        "nan": ("failed", "first_step_nonfinite"),
        "killed": ("failed", "crashed"),
        "stopped": ("interrupted", "healthy"),
        "left": ("ended", "healthy"),
        "silent": ("failed", "rank_lost"),
    }
    for number in range(KEPT):
        collector.run(f"r{number}")
        collector.wait(1000)
    assert set(conditions) == set(collector.runs.archived)
    after = collector.listed()
    assert {run["run"]: run for run in after["runs"][KEPT:]} == {run["run"]: run for run in before["runs"]}
    assert after["ended"] == len(conditions) + KEPT
    # A run's own page agrees with the list.
    for name, summary in collector.runs.archived.items():
        copy = collector.runs.get(name)
        assert copy is not None and summary_of(copy, collector.clock(), 900.0) == summary
    collector.store.close()


def test_a_list_has_as_many_ended_runs_as_it_was_asked_for(collector: Collector) -> None:
    def names(**query: str) -> list[str]:
        return [run["run"] for run in collector.listed(**query)["runs"]]

    collector.intake.apply(hello("live", launch_id="first", instance="live-first"), collector.session)
    every = ["live", *(f"r{number}" for number in reversed(range(10)))]
    assert names() == every
    assert names(ended="5") == every[:6] and collector.listed(ended="5")["ended"] == 10
    # They ended 1000 s, 2000 s and so on ago.
    assert names(ended_within="5001") == every[:6]
    assert names(ended_within="5001", ended="2") == every[:3]
    (*_, old) = collector.listed(recent="1")["runs"]
    assert (old["recent"], old["open_incidents"]) == (None, [])
    collector.store.close()


def test_a_long_list_is_encoded_beside_the_event_loop(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    collector.store.close()
    threads, encoded = list[bool](), api.json_response

    def noted(answer: Any) -> web.Response:
        threads.append(threading.current_thread() is not threading.main_thread())
        return encoded(answer)

    monkeypatch.setattr(api, "_SHORT_LIST", 9)
    monkeypatch.setattr(api, "json_response", noted)

    async def test() -> None:
        async with Server(config(collector.path.parent), collector.clock) as server, aiohttp.ClientSession() as client:
            for count in (9, 10):
                async with client.get(f"{server.url}/api/v1/runs?ended={count}") as response:
                    assert len((await response.json())["runs"]) == count

    serving(test())
    assert threads == [False, True]


def test_a_run_that_failed_within_a_day_is_in_trouble_though_many_have_ended_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collector = Collector(tmp_path / "db", Clock())
    collector.run("broken", reason="EXCEPTION", detail="RuntimeError: x")
    collector.wait(10)
    for number in range(5):
        collector.run(f"r{number}")
        collector.wait(1000)
    assert "broken" in collector.runs.archived
    collector.store.close()

    async def test() -> None:
        async with Server(config(tmp_path), collector.clock) as server:

            async def told(command: Callable[[list[str]], int], *arguments: str) -> tuple[int, str]:
                code = await asyncio.to_thread(command, ["--url", server.url, *arguments])
                return code, capsys.readouterr().out

            code, text = await told(status)
            assert code == 1 and "broken" in text and "more than a day ago" not in text
            assert json.loads((await told(status, "--json"))[1])["ended"] == 6
            _, text = await told(incidents)
            assert "broken" in text and "crashed" in text
            collector.clock.now += DAY - 5005
            code, text = await told(status)
            assert code == 0 and "broken" not in text and "r0" in text
            assert text.endswith("1 run ended more than a day ago; list with --all\n")
            code, text = await told(status, "--all")
            assert code == 1 and "broken" in text and "more than a day ago" not in text

    serving(test())


def test_a_request_that_cannot_read_a_run_counts_once_and_a_page_needs_no_reading(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, errors_expected: None
) -> None:
    collector.store.close()

    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    async def test() -> None:
        async with Server(config(collector.path.parent), collector.clock) as server, aiohttp.ClientSession() as client:
            monkeypatch.setattr(server.store, "restored", locked)
            codes = list[int]()
            for path in ("api/v1/runs/r2", "run/r2", "run/r77"):
                async with client.get(f"{server.url}/{path}") as response:
                    codes.append(response.status)
            assert codes == [500, 200, 404]
            assert value(await families(server), "foreshock_collector_errors", stage="page") == 1

    serving(test())
