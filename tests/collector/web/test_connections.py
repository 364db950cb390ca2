"""Clients that send nothing, or too slowly, or never read: they lose their connection, and nobody else does."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from pathlib import Path

import aiohttp
import pytest

from foreshock_collector.server import Server
from foreshock_collector.web import connections
from tests.support.streams import config, serving

SIZE = 2**24
REQUEST = b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BEGIN_SECONDS", 0.2), ("IDLE_SECONDS", 0.3), ("SWEEP_SECONDS", 0.05)):
        monkeypatch.setattr(connections, name, value)


class Client:
    """A connection that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def to(cls, server: Server, sent: bytes = b"") -> Client:
        client = cls(*await asyncio.open_connection("127.0.0.1", server.http_port))
        client.writer.write(sent)
        return client

    async def status(self) -> int:
        line = await self._reader.readline()
        headers = await self._reader.readuntil(b"\r\n\r\n")
        (length,) = (
            value for name, _, value in (h.partition(b":") for h in headers.split(b"\r\n")) if name == b"Content-Length"
        )
        await self._reader.readexactly(int(length))
        return int(line.split()[1])

    async def ended(self) -> None:
        """Wait until the collector has ended it."""
        try:
            while await self._reader.read(2**16):
                pass
        except ConnectionError:
            pass
        self.writer.close()


async def is_ready(server: Server) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/-/ready") as response:
        return response.status == 200


def test_a_connection_ends_that_sends_no_whole_request_in_time_and_one_that_stays_idle(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server, aiohttp.ClientSession() as session:
            viewer = await session.get(f"{server.url}/api/v1/live")
            silent, slow, idle = [await Client.to(server, sent) for sent in (b"", REQUEST, REQUEST + b"\r\n")]
            assert await idle.status() == 200
            idle.writer.write(REQUEST + b"\r\n")
            assert await idle.status() == 200
            for client in (silent, slow, idle):
                await client.ended()
            assert await is_ready(server)
            # It has a request all the time, and stays.
            assert (await viewer.content.readline()).startswith(b"event: change") and not viewer.content.at_eof()
            viewer.close()

    serving(test())


def test_of_too_many_silent_connections_the_oldest_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BEGIN_SECONDS", 1e9)
    monkeypatch.setattr(connections, "MOST_WAITING", 3)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            clients = [await Client.to(server) for _ in range(6)]
            for client in clients[:3]:
                await client.ended()
            assert await is_ready(server)
            clients[-1].writer.write(REQUEST + b"\r\n")
            assert await clients[-1].status() == 200
            for client in clients[3:]:
                client.writer.close()

    serving(test())


def test_connections_that_clients_have_closed_cost_no_other_client_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BEGIN_SECONDS", 1e9)
    monkeypatch.setattr(connections, "MOST_WAITING", 3)
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 1e9)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            slow = await Client.to(server, REQUEST)
            for _ in range(5):
                assert await is_ready(server)
            slow.writer.write(b"\r\n")
            assert await slow.status() == 200
            slow.writer.close()

    serving(test())


def test_a_client_that_never_reads_its_answer_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock_collector.web.app.generate_latest", lambda _: b"x" * SIZE)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port, limit=2**10)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            # Its buffer is full now. One that connects later has been idle for as long by the time it ends.
            later = await Client.to(server, REQUEST + b"\r\n")
            await later.ended()
            read = 0
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(2**16):
                    read += len(data)
            assert read < SIZE
            writer.close()
            assert await is_ready(server)

    serving(test())


def test_what_a_client_compresses_is_not_unpacked(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(2**26))

    async def test() -> None:
        async with Server(config(tmp_path)) as server, aiohttp.ClientSession() as session:
            headers = {"Content-Encoding": "gzip"}
            async with session.post(f"{server.url}/metrics", data=bomb, headers=headers) as response:
                assert response.status == 405
            assert await is_ready(server)

    serving(test())
