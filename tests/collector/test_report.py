"""`foreshock report`: one page that needs nothing else."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from foreshock_collector.cli import report
from foreshock_collector.server import Server
from tests.collector.test_replay import csv, explosion, healthy
from tests.collector.test_service import Stream, config, hello, serving, steps


def test_a_log_becomes_a_page_that_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert report([str(csv(tmp_path, explosion())), "-o", str(page)]) == 0
    text = page.read_text()
    assert "exploding_gradients" in text
    assert "step 126" in text
    assert len(re.findall(r"<h2>[^<]*(?:norm|Loss|rate)[^<]*</h2>", text)) == 3
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=", markup) == []
    assert re.findall(r"<script[^>]*src=", text) == []


def test_markdown_is_for_an_issue_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(csv(tmp_path, explosion())), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# log.csv\n")
    assert "**exploding_gradients**" in text
    assert "\n1. " in text


def test_a_healthy_log_says_that_nothing_has_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(csv(tmp_path, healthy())), "--markdown"]) == 0
    assert "Nothing has happened: 120 steps, all finite." in capsys.readouterr().out


def test_a_run_of_a_collector_becomes_a_page_and_its_name_stays_text(tmp_path: Path) -> None:
    name, page = "<script>alert(1)</script>", tmp_path / "report.html"

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            norms = [norm for _, _, norm in explosion()]
            await stream.send(hello(name), steps(1, norms, run=name))
            await stream.stored(len(norms))
            assert await asyncio.to_thread(report, [name, "--url", server.url, "-o", str(page)]) == 0
            await stream.close()

    serving(test())
    text = page.read_text()
    assert "exploding_gradients" in text
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_what_is_neither_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["nothing", "--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
