"""`foreshock report`: one page that needs nothing else."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from foreshock_collector.commands.cli import report
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.logs import csv, explosion, healthy
from tests.support.streams import Stream, config, hello, serving, steps


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
    assert "No incidents: 120 rows, all finite." in capsys.readouterr().out


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


def test_a_report_of_a_run_says_what_ran_and_when_and_where_to_read_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, page = "a b/{c}", tmp_path / "report.html"
    told = hello(
        name,
        model=pb.ModelSummary(
            type="GPT", layers=["in", "out"], parameters=["in.w", "out.w"], parameter_sizes=[1000, 24],
            parameter_layers=[0, 1],
        ),
        optimizer=pb.OptimizerSummary(type="AdamW", fused=True),
        clip="norm 1",
        started_seconds=1_700_000_000.0,
        versions={"foreshock": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    )  # fmt: skip

    found: list[str] = []

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            norms = [norm for _, _, norm in explosion()]
            batch = steps(1, norms, run=name, learning_rate=[0.1] * len(norms))
            batch.steps.global_layer_norms.extend([1.0] * 2 * len(norms))
            await stream.send(told, batch)
            await stream.stored(len(norms))
            arguments = [name, "--url", server.url]
            assert await asyncio.to_thread(report, [*arguments, "--markdown"]) == 0
            assert await asyncio.to_thread(report, [*arguments, "-o", str(page)]) == 0
            await stream.close()
            found.append(server.url)

    serving(test())
    text = capsys.readouterr().out
    for line in (
        "- likely root: unknown",
        f"- runbook: {found[0]}/runbooks/ForeshockExplodingGradients",
        "- condition: failing",
        "- ranks: 1 of 1 reporting",
        "- model: GPT, 2 layers, 1,024 elements in 2 parameters",
        "- optimizer: AdamW, fused",
        "- clip: norm 1",
        "- started: 2023-11-14 22:13:20 UTC",
        "- duration: ",
        "- versions: foreshock 0.1.0, python 3.11.7, torch 2.13.0",
        f"- page: {found[0]}/run/a%20b%2F%7Bc%7D",
    ):
        assert f"\n{line}" in text, line
    markup = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    for word in ("likely root", "runbook", "GPT, 2 layers", "torch 2.13.0", "2023-11-14 22:13:20 UTC"):
        assert word in markup


def test_a_run_with_steps_that_were_left_out_is_not_said_to_be_all_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            inf = float("inf")
            batch = steps(1, [1.0, inf, 1.0], loss_scale=[65536.0] * 3, flags=[pb.LOSS_OBSERVED] * 3, loss=[2.0] * 3)
            await stream.send(hello(), batch)
            await stream.stored(3)
            assert await asyncio.to_thread(report, ["r", "--url", server.url, "--markdown"]) == 0
            await stream.close()

    serving(test())
    assert "No incidents: 3 steps, not all finite (gradient inf 1), without harm." in capsys.readouterr().out


def test_what_is_neither_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["nothing", "--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
