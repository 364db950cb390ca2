"""Certificates of the collector and of recorders, in files that are read again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.commands.client import ClientError, ask
from foreshock_collector.config import Config, ConfigError
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, run_stream
from tests.support.certificates import expire, sign
from tests.support.streams import config, hello, serving
from tests.support.tokens import table

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name, by in (("ca", ""), ("collector", "ca"), ("node", "ca"), ("stranger", ""), ("expired", "ca")):
        sign(folder, name, by)
    expire(folder, "expired", "ca")
    return folder


def settings(tmp_path: Path, folder: Path, **changes: Any) -> Config:
    files = {"tls_certificate": str(folder / "collector.crt"), "tls_key": str(folder / "collector.key")}
    return config(tmp_path, **(files | changes))


async def greet(server: Server) -> str:
    """Name that the run was given, by the recorder's own stream."""
    named: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def send(message: Send) -> None:
        await message(hello())
        await asyncio.shield(named)

    def on_ack(ack: pb.Ack) -> None:
        if ack.positions and not named.done():
            named.set_result(ack.positions[0].run)

    stream = asyncio.create_task(run_stream(server.address, send, on_ack))
    await asyncio.wait((stream, named), return_when=asyncio.FIRST_COMPLETED)
    if not named.done():
        stream.result()
    stream.cancel()
    await asyncio.wait((stream,))
    return named.result()


def test_recorders_and_commands_reach_a_collector_with_tls_and_a_token_by_files(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, token = tmp_path / "tokens.toml", tmp_path / "token"
    tokens.write_text(table("secret", '"write", "read"'))

    async def test() -> None:
        async with Server(settings(tmp_path, folder, tokens=str(tokens))) as server:
            with pytest.raises(UnreachableError):
                await greet(server)
            monkeypatch.setenv("FORESHOCK_CA_FILE", str(folder / "ca.crt"))
            with pytest.raises(RefusedError, match="a token with the right to write is required"):
                await greet(server)
            monkeypatch.setenv("FORESHOCK_TOKEN_FILE", str(token))
            with pytest.raises(RefusedError, match=f"FORESHOCK_TOKEN_FILE: {token} cannot be read"):
                await greet(server)
            token.write_text("secret\n")
            assert await greet(server) == "r"
            assert server.url.startswith("https://")
            answer = await asyncio.to_thread(ask, server.url, "runs")
            assert [run["run"] for run in answer["runs"]] == ["r"]
            token.write_text("guess\n")
            with pytest.raises(ClientError, match="401"):
                await asyncio.to_thread(ask, server.url, "runs")
            monkeypatch.setenv("FORESHOCK_CA_FILE", str(folder / "stranger.crt"))
            with pytest.raises(ClientError, match=r"(?i)certificate"):
                await asyncio.to_thread(ask, server.url, "runs")
            with pytest.raises(UnreachableError):
                await greet(server)

    serving(test())


def test_a_recorder_shows_a_certificate_where_the_collector_asks_for_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOCK_CA_FILE", str(folder / "ca.crt"))

    async def test() -> None:
        async with Server(settings(tmp_path, folder, tls_client_ca=str(folder / "ca.crt"))) as server:
            with pytest.raises(UnreachableError):
                await greet(server)
            for name, accepted in (("stranger", False), ("expired", False), ("node", True)):
                monkeypatch.setenv("FORESHOCK_CERTIFICATE_FILE", str(folder / f"{name}.crt"))
                monkeypatch.setenv("FORESHOCK_KEY_FILE", str(folder / f"{name}.key"))
                if accepted:
                    assert await greet(server) == "r"
                else:
                    with pytest.raises(UnreachableError):
                        await greet(server)

    serving(test())


def test_recorders_and_commands_refuse_a_collector_whose_certificate_has_expired(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOCK_CA_FILE", str(folder / "ca.crt"))
    files = {"tls_certificate": str(folder / "expired.crt"), "tls_key": str(folder / "expired.key")}

    async def test() -> None:
        async with Server(settings(tmp_path, folder, **files)) as server:
            with pytest.raises(UnreachableError):
                await greet(server)
            with pytest.raises(ClientError, match="certificate has expired"):
                await asyncio.to_thread(ask, server.url, "runs")

    serving(test())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tls_key": ""}, "require each other"),
        ({"tls_certificate": "", "tls_key": "", "tls_client_ca": "ca.crt"}, "--tls-client-ca requires"),
        ({"tls_key": "/nowhere"}, "cannot be used"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, folder: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Server(settings(tmp_path, folder, **changes))


def test_the_key_of_another_certificate_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Server(settings(tmp_path, folder, tls_key=str(folder / "node.key")))
