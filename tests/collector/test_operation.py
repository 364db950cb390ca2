"""What an operator of the collector sees: its log, and the series about itself."""

from __future__ import annotations

import json
import logging
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest

from foreshock_collector.catalogue import REFUSAL_REASONS
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.log_format import JsonFormatter, TextFormatter
from foreshock_collector.server import Server, allow_open_files
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import Stream, config, families, goodbye, hello, serving, steps, value


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foreshock_collector")


def refusals(found: dict[str, Any]) -> dict[str, float]:
    counts = {sample.labels["reason"]: sample.value for sample in found["foreshock_collector_refused"].samples}
    assert counts.keys() == set(REFUSAL_REASONS)
    return {reason: count for reason, count in counts.items() if count}


def facts(caplog: pytest.LogCaptureFixture, words: str) -> list[dict[str, Any]]:
    """What the events say whose messages begin so."""
    found = [record for record in caplog.records if record.getMessage().startswith(words)]
    assert all(isinstance(record.args, dict) for record in found)
    return [dict(record.args) for record in found]  # type: ignore[arg-type]


def test_garbage_and_an_unknown_version_are_two_lines_and_a_count_of_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            assert refusals(await families(server)) == {}
            for message in (b"\xff\xff\xff", hello(schema_version=9)):
                stream = Stream(server)
                await stream.send(message)
                await stream.refusal()
                await stream.close()
            assert refusals(await families(server)) == {"malformed": 1, "schema_version": 1}

    serving(test())
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    garbage, unknown = facts(caplog, "refused the stream of ipv4:127.0.0.1:")
    assert garbage["reason"] == "malformed"
    assert unknown["reason"] == "schema_version"
    assert "schema version 9" in unknown["why"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": ""}, "invalid_value"),
        ({"topology": pb.Topology(rank=0, world_size=1, node="node-7")}, "contradiction"),
    ],
)
def test_a_rank_that_is_refused_is_logged_with_its_run_its_node_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            wrong = {"instance": "wrong", "topology": pb.Topology(world_size=1, node="node-7"), **changes}
            await stream.send(hello(), hello(**wrong))
            await stream.positions(2)
            assert refusals(await families(server)) == {reason: 1}
            await stream.close()

    serving(test())
    (refused,) = facts(caplog, "refused rank 0 of run ")
    assert (refused["instance"], refused["node"], refused["reason"]) == ("wrong", "node-7", reason)
    assert refused["peer"].startswith("ipv4:127.0.0.1:")


async def half_close(stream: Stream) -> None:
    await stream.call.done_writing()
    while await stream.call.read() is not grpc.aio.EOF:
        pass


async def cancel(stream: Stream) -> None:
    stream.call.cancel()


async def end_job(stream: Stream) -> None:
    """As a recorder does: it hangs up once it knows that all is stored."""
    await stream.send(goodbye(1))
    while not (await stream.positions(1))[0].closed:
        pass
    stream.call.cancel()


@pytest.mark.parametrize(
    ("end", "reason"),
    [(half_close, "closed"), (cancel, "disconnected"), (end_job, "exited"), (None, "drained")],
)
def test_the_end_of_a_stream_is_logged_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: Callable[[Stream], Any] | None, reason: str
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0]))
            await stream.stored(1)
            assert value(await families(server), "foreshock_collector_streams") == 1
            if end is not None:
                await end(stream)
                while value(await families(server), "foreshock_collector_streams"):
                    pass
        await stream.close()

    serving(test())
    (ended,) = facts(caplog, "stream of ipv4:127.0.0.1:")
    assert (ended["reason"], ended["instances"]) == (reason, 1)


def test_messages_and_records_are_counted_as_they_come(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 10), steps(6, [1.0] * 10))
            await stream.stored(15)
            found = await families(server)
            assert value(found, "foreshock_collector_messages") == 3
            assert value(found, "foreshock_collector_records") == 20
            await stream.close()

    serving(test())


def test_a_collector_shows_its_version_its_process_and_the_size_of_its_database(tmp_path: Path) -> None:
    async def test() -> None:
        began = time.time()
        async with Server(config(tmp_path)) as server:
            found = await families(server)
            labels = {"version": version("foreshock"), "python": platform.python_version()}
            assert value(found, "foreshock_build_info", **labels) == 1
            assert 0 < value(found, "process_start_time_seconds") < began + 1
            assert value(found, "process_resident_memory_bytes") > 1e6
            size = sum((tmp_path / name).stat().st_size for name in ("db", "db-wal"))
            assert value(found, "foreshock_collector_database_bytes") == size > 0

    serving(test())


def test_a_run_that_expires_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, session = Clock(), Session()
    store = Store(tmp_path / "db")
    intake = Intake(Runs(), store, clock, ended_seconds=900.0, silent=900.0)
    for message in (hello(), steps(1, [1.0]), goodbye(1)):
        intake.apply(message, session)
    for _ in range(4):
        clock.now += 450
        intake.commit()
        intake.expire()
    store.close()
    assert facts(caplog, "run r expired") == [{"run": "r", "experiment": "e"}]


def test_idle_connections_have_all_files_that_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def collector(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One that is started, ready, and stopped again."""
    ready = folder / "ready"
    ports = ["--grpc-port", "0", "--http-port", "0", "--database", str(folder / "db"), "--ready-file", str(ready)]
    command = [sys.executable, "-m", "foreshock_collector", *ports, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.integration
def test_start_and_stop_are_a_line_each_in_either_form(tmp_path: Path) -> None:
    done = collector(tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    started, stopped = done.stderr.splitlines()
    head = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO collector "
    assert re.fullmatch(head + r"\S+ started: records to 127\.0\.0\.1:\d+, page at http://127\.0\.0\.1:\d+", started)
    assert re.fullmatch(head + "stopped on SIGTERM", stopped)
    (tmp_path / "ready").unlink()
    done = collector(tmp_path, "--log-format", "json")
    started, stopped = (json.loads(line) for line in done.stderr.splitlines())
    assert (started["level"], started["version"]) == ("info", version("foreshock"))
    assert started["page"].startswith("http://127.0.0.1:")
    assert stopped["signal"] == "SIGTERM"


@pytest.mark.integration
def test_a_collector_that_cannot_start_says_so_in_the_form_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database, but long enough to be looked at as if it were one" * 20)
    done = collector(tmp_path, "--log-format", "json")
    assert done.returncode == 2
    line = json.loads(done.stderr)
    assert line["level"] == "error"
    assert "cannot be used" in line["message"]


def test_a_line_holds_the_traceback_and_names_of_any_kind() -> None:
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError:
        told = sys.exc_info()
    record = logging.LogRecord("foreshock_collector", logging.ERROR, "", 1, "run %(run)s", ({"run": 'a"\n'},), told)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["run"] == 'a"\n'
    assert found["exception"].endswith("ZeroDivisionError: division by zero")
    assert TextFormatter().format(record).endswith("ZeroDivisionError: division by zero")
