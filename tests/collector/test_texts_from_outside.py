"""Hostile text in every field of every message: it is shown as text, on one line, wherever it is shown."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from foreshock_collector.commands.cli import incidents, report, status
from foreshock_collector.log_format import JsonFormatter, TextFormatter
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, families, hello, serving, steps

MARKUP = "<script>alert(1)</script>"
HOSTILE = f"{MARKUP}\x1b[2J\x1b]0;x\x07\r\n# \x85\u2028\u202e\u2066\u200b\x00\"'`|[x](javascript:x)"
SAID_BY_PROBES = {"instance", "token", "capabilities"}
"""Names and a secret that probes make: an instance that cannot be printed is refused, the others are not shown."""
NORMS = [1.0] * 40 + [float("nan")]


def fill(message: Message) -> None:
    """Put hostile text into every field that holds text."""
    for field in message.DESCRIPTOR.fields:
        if field.name in SAID_BY_PROBES:
            continue
        content, kind = getattr(message, field.name), field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            content[HOSTILE] = HOSTILE if kind.fields_by_name["value"].type == field.TYPE_STRING else 1
        elif kind is not None:
            for each in (content,) if isinstance(content, Message) else content:
                fill(each)
        elif field.type == field.TYPE_STRING:
            if isinstance(content, str):
                setattr(message, field.name, HOSTILE)
            else:
                content[:] = [HOSTILE + str(i) for i in range(max(1, len(content)))]


def filled(message: Message) -> Iterator[str]:
    """The full names of the fields of a message that hold hostile text."""
    for field, content in message.ListFields():
        kind = field.message_type
        if kind is not None and not kind.GetOptions().map_entry:
            for each in (content,) if isinstance(content, Message) else content:
                yield from filled(each)
        elif field.type != field.TYPE_BYTES and MARKUP in str(content):
            yield field.full_name


def fields_with_text(kind: Any) -> Iterator[str]:
    """The full names of all fields that may hold text in a message of this kind."""
    for field in kind.fields:
        if field.name in SAID_BY_PROBES:
            continue
        inner = field.message_type
        if inner is not None and not inner.GetOptions().map_entry:
            yield from fields_with_text(inner)
        elif inner is not None or field.type == field.TYPE_STRING:
            yield field.full_name


def messages() -> list[pb.FromRecorder]:
    """A message of every kind: a run with an incident, an error of its probe and an exit, with hostile texts only."""
    model = pb.ModelSummary(layers=["a"], parameters=["a"], parameter_sizes=[1], parameter_layers=[0])
    batch = steps(1, NORMS, global_nan_parameters=[0] * 40 + [1], learning_rate=[0.1] * 41)
    batch.steps.global_layer_norms.extend(NORMS)
    sent = [
        hello(model=model),
        batch,
        pb.FromRecorder(block=pb.StepBlock(ranks=[pb.StepBlock.Rank(instance="r-0")], first_sequence=42)),
        pb.FromRecorder(event=pb.Event(instance="r-0", kind=pb.Event.PROBE_ERROR, step=41)),
        pb.FromRecorder(event=pb.Event(instance="r-0", kind=pb.Event.RANK_LOST, step=41)),
        pb.FromRecorder(exit=pb.Exit(instance="r-0", reason=pb.ExitReason.EXCEPTION, last_sequence=41)),
    ]
    for message in sent:
        fill(getattr(message, str(message.WhichOneof("message"))))
    return sent


def get(url: str, accept: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as response:
        return str(response.read().decode())


def texts(value: Any) -> Iterator[str]:
    """All texts of a JSON value, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def unprintable(text: str) -> list[str]:
    """The lines of a text that would move a cursor, color or reorder a terminal, or break a line."""
    return [line for line in text.split("\n") if not line.isprintable()]


def said(command: Any, *arguments: str) -> str:
    """What a command writes to standard output and standard error."""
    with contextlib.redirect_stdout(out := io.StringIO()), contextlib.redirect_stderr(out):
        assert command(list(arguments)) in (0, 1)
    return out.getvalue()


def test_no_text_of_a_message_runs_on_a_page_or_breaks_a_label_an_answer_a_report_a_terminal_or_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent = messages()
    assert {name for message in sent for name in filled(message)} == set(fields_with_text(pb.FromRecorder.DESCRIPTOR))
    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(*sent)
            while not (await stream.call.read()).positions[0].closed:
                pass
            for family in (await families(server)).values():
                for sample in family.samples:
                    assert all(value.isprintable() for value in sample.labels.values()), sample
            await asyncio.to_thread(look, server.url)
            await stream.close()

    def look(url: str) -> None:
        (run,) = json.loads(get(f"{url}/api/v1/runs?recent=1", "*/*"))["runs"]
        name = run["run"]
        of_run = f"{url}/api/v1/runs/{urllib.parse.quote(name, safe='')}"
        number = json.loads(get(of_run, "*/*"))["incidents"][-1]["id"]
        parts = ("", "/steps", "/series", "/heat/ranks", "/heat/layers", "/heat/updates", f"/incidents/{number}")
        for address in (f"{url}/api/v1/runs", *(of_run + part for part in parts)):
            found = list(texts(json.loads(get(address, "*/*"))))
            assert found and [text for text in found if not text.isprintable()] == [], address
        pages = [get(f"{url}{path}", "text/html") for path in ("/", f"/run/{urllib.parse.quote(name, safe='')}")]
        page = tmp_path / "report.html"
        assert report([name, "--url", url, "-o", str(page)]) == 0
        for text in (*pages, page.read_text()):
            assert MARKUP not in text
        shown = [said(status, "--url", url), said(status, "--url", url, name), said(incidents, "--url", url)]
        shown += [said(incidents, "--url", url, name), said(report, name, "--url", url, "--markdown")]
        markup = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
        for text in (*shown, markup):
            assert text and unprintable(text) == []

    serving(test())
    lines = [form.format(record) for record in caplog.records for form in (TextFormatter(), JsonFormatter())]
    assert lines and [line for line in lines if not line.isprintable()] == []
