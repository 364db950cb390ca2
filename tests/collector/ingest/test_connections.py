"""Clients of the gRPC port that say nothing, or not enough: they lose their connection, and recorders are served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from foreshock_collector.ingest import service
from foreshock_collector.server import Server
from tests.support.certificates import sign
from tests.support.streams import Deaf, Stream, config, hello, serving, steps

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
SILENT = {
    "nothing": b"",
    "half of a greeting": PREFACE[:10],
    "a greeting without its settings": PREFACE,
    "no stream": PREFACE + SETTINGS,
    "what is no HTTP/2": b"GET / HTTP/1.1\r\n\r\n",
}
MANY = 200


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, reached sooner."""
    sooner = {"grpc.max_connection_idle_ms": 500, "grpc.server_handshake_timeout_ms": 500}
    options = dict(service._OPTIONS)
    assert sooner.keys() <= options.keys()
    monkeypatch.setattr(service, "_OPTIONS", tuple((options | sooner).items()))


async def ends(server: Server, sent: bytes) -> bool:
    """Whether the collector ends a connection that sends so much and no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.grpc_port)
    writer.write(sent)
    try:
        while await reader.read(4096):
            pass
    except ConnectionError:
        return True
    finally:
        writer.close()
    return True


@pytest.mark.parametrize("sent", SILENT.values(), ids=SILENT)
def test_a_connection_that_begins_no_stream_is_ended(tmp_path: Path, sent: bytes) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            assert await ends(server, sent)

    serving(test())


@pytest.mark.integration
def test_with_tls_a_connection_without_a_handshake_is_ended(tmp_path: Path) -> None:
    files = sign(tmp_path, "collector")

    async def test() -> None:
        settings = config(tmp_path, tls_certificate=str(files["crt"]), tls_key=str(files["key"]))
        async with Server(settings) as server:
            for sent in (b"", b"\x16\x03\x01"):
                assert await ends(server, sent)

    serving(test())


def test_many_connections_that_begin_no_stream_keep_no_recorder_from_storing(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            silent = [asyncio.create_task(ends(server, sent)) for sent in list(SILENT.values()) * (MANY // len(SILENT))]
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 10))
            await stream.stored(10)
            assert all(await asyncio.gather(*silent))
            await stream.send(steps(11, [1.0] * 10))
            await stream.stored(20)
            await stream.close()

    serving(test())


def test_a_recorder_that_reads_nothing_is_told_no_more_than_it_takes_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = Deaf("deaf-0", monkeypatch)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            silent, other = Stream(server), Stream(server)
            await silent.send(hello("deaf", launch_id="deaf"), steps(1, [1.0], run="deaf"))
            await other.send(hello())
            step = await deaf.stuck(other, 1)
            told = deaf.told
            for sequence in range(step, step + 20):
                await silent.send(steps(sequence, [1.0], run="deaf"))
                await other.send(steps(sequence, [1.0]))
                await other.stored(sequence)
            assert deaf.told == told
            for stream in (silent, other):
                await stream.close()

    serving(test())
