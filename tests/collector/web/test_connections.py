"""Clients that send nothing, or too slowly, or never read: they lose their connection, and nobody else does."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from foreshock_collector.server import Server
from foreshock_collector.web import connections
from foreshock_collector.web.connections import ANSWER_SECONDS, BEGIN_SECONDS, IDLE_SECONDS, Connections, bytes_taken
from tests.support.certificates import sign
from tests.support.streams import config, serving

REQUEST = b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n"
BUFFER = 2**16
"""That a client asks its kernel for."""
PIECE = 4 * BUFFER
SIZE = 16 * PIECE + int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[-1])
"""Of an answer that the buffers of both kernels have no room for."""


class Waiting(Connections):
    """Connections whose time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(lambda: self.now)

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.end_late()

    async def end_idle(self) -> None:
        """Once its kernel takes in nothing more, each ends."""
        while self.waiting:
            self.after(IDLE_SECONDS)
            await asyncio.sleep(0)

    async def another(self, than: list[web.RequestHandler]) -> web.RequestHandler:
        """Wait until the collector has one more."""
        while not (found := [each for each in self.waiting if each not in than]):
            await asyncio.sleep(0)
        return found[0]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    waiting = Waiting()
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 1e9)
    monkeypatch.setattr("foreshock_collector.web.app.Connections", lambda: waiting)
    return waiting


class Client:
    """A connection that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, server: Server, sent: bytes = b"") -> Client:
        client = cls(*await asyncio.open_connection("127.0.0.1", server.http_port))
        client.writer.write(sent)
        return client

    async def status(self) -> int:
        line = await self.reader.readline()
        headers = await self.reader.readuntil(b"\r\n\r\n")
        (length,) = (
            value for name, _, value in (h.partition(b":") for h in headers.split(b"\r\n")) if name == b"Content-Length"
        )
        await self.reader.readexactly(int(length))
        return int(line.split()[1])

    async def ended(self) -> int:
        """Wait until the collector has ended it. Return how many bytes came before."""
        read = 0
        with suppress(ConnectionError):
            while data := await self.reader.read(2**16):
                read += len(data)
        self.writer.close()
        return read


async def is_ready(server: Server) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/-/ready") as response:
        return response.status == 200


def test_a_connection_ends_that_sends_no_whole_request_in_time_and_one_that_stays_idle(
    tmp_path: Path, waiting: Waiting
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server, aiohttp.ClientSession() as session:
            viewer = await session.get(f"{server.url}/api/v1/live")
            idle = await Client.to(server, REQUEST + b"\r\n")
            assert await idle.status() == 200
            late = []
            for sent in (b"", REQUEST):
                known = waiting.waiting
                late.append(await Client.to(server, sent))
                await waiting.another(known)
            waiting.after(BEGIN_SECONDS - 1)
            assert len(waiting.waiting) == 3
            waiting.after(1)
            for client in late:
                await client.ended()
            idle.writer.write(REQUEST + b"\r\n")
            assert await idle.status() == 200
            waiting.after(IDLE_SECONDS - 1)
            assert len(waiting.waiting) == 1
            await waiting.end_idle()
            await idle.ended()
            assert await is_ready(server)
            # It has a request all the time, and stays.
            assert (await viewer.content.readline()).startswith(b"event: change") and not viewer.content.at_eof()
            viewer.close()

    serving(test())


def test_of_too_many_silent_connections_the_oldest_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: Waiting
) -> None:
    monkeypatch.setattr(connections, "MOST_WAITING", 3)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            clients = []
            for _ in range(6):
                known = waiting.waiting
                clients.append(await Client.to(server))
                await waiting.another(known)
            for client in clients[:3]:
                await client.ended()
            assert await is_ready(server)
            clients[-1].writer.write(REQUEST + b"\r\n")
            assert await clients[-1].status() == 200
            for client in clients[3:]:
                client.writer.close()

    serving(test())


def test_connections_that_clients_have_closed_cost_no_other_client_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: Waiting
) -> None:
    monkeypatch.setattr(connections, "MOST_WAITING", 3)

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            slow = await Client.to(server, REQUEST)
            for _ in range(5):
                assert await is_ready(server)
            slow.writer.write(b"\r\n")
            assert await slow.status() == 200
            slow.writer.close()

    serving(test())


@pytest.mark.integration
def test_a_connection_that_is_slow_in_its_tls_handshake_ends_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: Waiting
) -> None:
    monkeypatch.setattr(connections, "MOST_WAITING", 3)
    files = sign(tmp_path, "collector")
    context = ssl.create_default_context(cafile=files["crt"])

    async def test() -> None:
        settings = config(tmp_path, tls_certificate=str(files["crt"]), tls_key=str(files["key"]))
        async with Server(settings) as server, aiohttp.ClientSession() as session:
            begun = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(5)]
            async with session.get(f"{server.url}/-/ready", ssl=context) as response:
                assert response.status == 200
            known = waiting.waiting
            silent = Client(*await asyncio.open_connection(sock=begun[0], ssl=context, server_hostname="localhost"))
            await waiting.another(known)
            waiting.after(BEGIN_SECONDS)
            await silent.ended()
            for each in begun[1:]:
                each.close()

    serving(test())


async def begin_to_read(server: Server, waiting: Waiting) -> tuple[Client, web.RequestHandler]:
    """Ask for an answer of so many bytes, and read its first line."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.http_port))
    client = Client(*await asyncio.open_connection(sock=connection, limit=2**10))
    client.writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await client.reader.readline() == b"HTTP/1.1 200 OK\r\n"
    (protocol,) = waiting.waiting
    return client, protocol


@pytest.fixture
def long_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock_collector.web.rendering.Renderer.render_in_parts", lambda _, **_form: [b"x" * SIZE])


def test_a_client_that_never_reads_its_answer_loses_its_connection(
    tmp_path: Path, waiting: Waiting, long_answers: None
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            client, _ = await begin_to_read(server, waiting)
            await waiting.end_idle()
            assert await client.ended() < SIZE
            assert await is_ready(server)

    serving(test())


def test_a_client_that_reads_its_answer_slowly_gets_all_of_it(
    tmp_path: Path, waiting: Waiting, long_answers: None
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            client, protocol = await begin_to_read(server, waiting)
            await client.reader.readuntil(b"\r\n\r\n")
            for _ in range(4):
                taken = bytes_taken(protocol)
                await client.reader.readexactly(PIECE)
                while bytes_taken(protocol) == taken:
                    await asyncio.sleep(0)
                waiting.after(IDLE_SECONDS)
            await client.reader.readexactly(SIZE - 4 * PIECE)
            client.writer.write(REQUEST + b"\r\n")
            assert await client.status() == 200
            client.writer.close()

    serving(test())


def test_a_client_that_reads_too_long_at_one_answer_loses_its_connection(
    tmp_path: Path, waiting: Waiting, long_answers: None
) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            client, protocol = await begin_to_read(server, waiting)
            await client.reader.readuntil(b"\r\n\r\n")
            read = 0
            last = waiting.now + ANSWER_SECONDS
            while waiting.now + IDLE_SECONDS < last:
                taken = bytes_taken(protocol)
                await client.reader.readexactly(PIECE)
                read += PIECE
                while bytes_taken(protocol) == taken:
                    await asyncio.sleep(0)
                waiting.after(IDLE_SECONDS - 1)
                assert waiting.waiting == [protocol]
            waiting.after(last - waiting.now)
            assert read + await client.ended() < SIZE
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
