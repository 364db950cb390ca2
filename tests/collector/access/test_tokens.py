"""Tokens: each for its experiments and its right, and changed without a restart."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from foreshock_collector.access.tokens import Token, Tokens, TokensError, read_tokens, secret_in
from foreshock_collector.config import ConfigError
from foreshock_collector.server import Server
from tests.support.clock import Clock
from tests.support.streams import Deaf, Stream, config, hello, serving, steps
from tests.support.tokens import digest, table


@pytest.fixture
def errors_expected() -> None:
    """A wrong file is logged as an error."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        table("writer", '"write"')
        + table("vision", '"write", "read"', "vision-*")
        + table("prometheus", '"read"')
        + table("old", '"write", "read"', more="expires = 2027-06-01")
    )
    return path


class Files:
    """A file of tokens, and a time at which it is looked at again."""

    def __init__(self, path: Path) -> None:
        self.clock, self.seconds = Clock(), 0.0
        self.tokens = Tokens(path, self.clock, lambda: self.seconds)

    def valid(self, token: Token) -> bool:
        self.seconds += 10
        return self.tokens.is_valid(token)

    def name(self, secret: str, right: Any) -> str:
        self.seconds += 10
        found = self.tokens.find(secret, right)
        return found.name if found else ""


def test_a_token_has_its_rights_until_it_expires(path: Path) -> None:
    files = Files(path)
    assert [files.name("writer", right) for right in ("write", "read")] == ["writer", ""]
    assert [files.name("vision", right) for right in ("write", "read")] == ["vision", "vision"]
    assert [files.name(wrong, "read") for wrong in ("", "guess", digest("vision"), "\ud800")] == [""] * 4
    assert files.name("old", "read") == "old"
    files.clock.now += 365 * 86400
    assert files.name("old", "read") == ""


def test_a_token_that_was_found_is_valid_until_it_is_removed_changed_or_expired(path: Path) -> None:
    files = Files(path)
    found = {secret: files.tokens.find(secret, "write") for secret in ("writer", "vision", "old")}
    tokens = {secret: token for secret, token in found.items() if token is not None}
    assert len(tokens) == 3 and all(map(files.valid, tokens.values()))
    path.write_text(path.read_text().replace('name = "', 'name = "renamed '))
    assert all(map(files.valid, tokens.values())) and files.name("vision", "write") == "renamed vision"
    path.write_text(
        table("vision", '"write", "read"', "*") + table("old", '"write", "read"', more="expires = 2027-06-01")
    )
    assert [files.valid(token) for token in tokens.values()] == [False, False, True]
    files.clock.now += 365 * 86400
    assert not files.valid(tokens["old"])


def test_a_file_that_changes_is_read_again_and_a_wrong_one_changes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(path)
    path.write_text(table("new", '"read"'))
    assert [files.name(secret, "read") for secret in ("new", "vision")] == ["new", ""]
    path.write_text("[[tokens]]\n")
    assert files.name("new", "read") == "new"
    assert "sha256 must be 64 hexadecimal digits in lower case; the tokens before the change stay valid" in caplog.text
    path.unlink()
    assert files.name("new", "read") == "new"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"a list of \[\[tokens\]\]"),
        ("tokens = 3", r"a list of \[\[tokens\]\]"),
        (table("a", '"admin"'), "number 1: rights must be a list of write and read"),
        (table("a", '"read"') + table("b", ""), "number 2: rights"),
        (table("a", '"read"', ""), "name and experiment"),
        (table("a", '"read"', more="expires = 3"), "expires must be a date"),
        (table("a", '"read"', more='token = "a"'), "unknown token"),
        ("tokens = [", "tokens"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(TokensError, match=says):
        read_tokens(path)

    async def test() -> None:
        with pytest.raises(ConfigError, match="--tokens"):
            async with Server(config(tmp_path, tokens=str(path))):
                pass

    serving(test())


def test_a_token_is_found_in_either_scheme() -> None:
    basic = base64.b64encode(b"anyone:secret:with:colons").decode()
    shown = [f"Bearer {'a' * 9}", "bearer  x ", f"Basic {basic}", "Basic ?", "Basic /w==", "Digest x", "", "Bearer"]
    assert [secret_in(each) for each in shown] == ["a" * 9, "x", "secret:with:colons", "", "", "", "", ""]


def test_without_a_token_for_it_no_stream_is_accepted_and_no_experiment_written(tmp_path: Path, path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, tokens=str(path))) as server:
            for secret in (None, "guess", "prometheus"):
                stream = Stream(server, token=secret)
                code, text = await stream.refusal()
                assert (code, text) == (
                    grpc.StatusCode.UNAUTHENTICATED,
                    "a token with the right to write is required",
                )
                await stream.close()
            stream = Stream(server, token="vision")
            await stream.send(hello("theirs", experiment="language"), hello("ours", experiment="vision-7"))
            await stream.send(steps(1, [1.0], run="ours"), steps(1, [1.0], run="theirs"))
            ours, theirs = await stream.positions(2)
            while not ours.sequence:
                ours, theirs = await stream.positions(2)
            assert theirs.refused == "the recorder's token is for experiments 'vision-*', not 'language'"
            await stream.close()

    serving(test())


async def status(session: aiohttp.ClientSession, url: str, secret: str) -> int:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    async with session.get(url, headers=headers) as response:
        if response.status == 401:
            assert response.headers["WWW-Authenticate"].startswith("Basic")
        return response.status


def test_a_token_reads_its_own_experiments_and_no_other(tmp_path: Path, path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, tokens=str(path))) as server, aiohttp.ClientSession() as session:
            stream = Stream(server, token="writer")
            for run, experiment in (("ours", "vision-7"), ("theirs", "language")):
                await stream.send(hello(run, launch_id=run, experiment=experiment))
            await stream.positions(2)
            everything = ("/metrics", "/api/v1/runs", "/api/v1/live")
            of_one = [f"{path}/{{run}}" for path in ("/api/v1/runs", "/run")]
            of_one += ["/api/v1/runs/{run}/steps", "/api/v1/runs/{run}/heat/ranks", "/api/v1/runs/{run}/incidents/1"]
            for path_ in (
                *everything,
                "/",
                "/static/nothing.js",
                "/runbooks",
                *(each.format(run="ours") for each in of_one),
            ):
                for wrong in ("", "guess", "writer"):
                    assert await status(session, server.url + path_, wrong) == 401, path_
            for path_ in everything:
                assert await status(session, server.url + path_, "vision") == 403
                assert await status(session, server.url + path_, "prometheus") == 200
            for path_ in (
                "/metrics?run=ours",
                "/api/v1/runs?run=ours",
                "/metrics?run=none",
                "/api/v1/live?run=",
                "/api/v1/live?run=none",
            ):
                assert await status(session, server.url + path_, "vision") == 403, path_
            for path_ in (*of_one, "/api/v1/live?run={run}"):
                assert await status(session, server.url + path_.format(run="theirs"), "vision") == 403
                assert await status(session, server.url + path_.format(run="ours"), "vision") in (200, 404)
            for path_ in ("/-/healthy", "/-/ready"):
                assert await status(session, server.url + path_, "") == 200
            await stream.close()

    serving(test())


async def read_to_the_end(stream: Stream) -> None:
    while await stream.call.read() is not grpc.aio.EOF:
        pass


def test_open_streams_end_when_their_token_expires(tmp_path: Path, path: Path) -> None:
    clock = Clock()

    async def test() -> None:
        settings = config(tmp_path, tokens=str(path))
        headers = {"Authorization": "Bearer old"}
        async with Server(settings, clock) as server, aiohttp.ClientSession(headers=headers) as session:
            streams = {secret: Stream(server, token=secret) for secret in ("old", "writer")}
            for secret, stream in streams.items():
                await stream.send(hello(secret, launch_id=secret), steps(1, [1.0], run=secret))
                await stream.stored(1)
            async with session.get(f"{server.url}/api/v1/live") as response:
                assert (await response.content.readline()).startswith(b"event: change")
                clock.now += 365 * 86400
                await response.content.read()
            with pytest.raises(grpc.aio.AioRpcError, match="the token of this stream is no longer valid") as refusal:
                await read_to_the_end(streams["old"])
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await streams["writer"].send(steps(2, [1.0], run="writer"))
            await streams["writer"].stored(2)
            for stream in streams.values():
                await stream.close()

    serving(test())


def test_a_stream_that_reads_no_acknowledgement_writes_nothing_once_its_token_has_expired(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, deaf = Clock(), Deaf("old-0", monkeypatch)

    async def stored(server: Server) -> int:
        headers = {"Authorization": "Bearer prometheus"}
        url = f"{server.url}/api/v1/runs/old"
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
            return int((await response.json())["counters"]["steps"])

    async def test() -> None:
        async with Server(config(tmp_path, tokens=str(path)), clock) as server:
            old, writer = Stream(server, token="old"), Stream(server, token="writer")
            await old.send(hello("old", launch_id="old"), steps(1, [1.0], run="old"))
            await writer.send(hello())
            step = await deaf.stuck(writer, 1)
            assert await stored(server) == 1
            clock.now += 365 * 86400
            await old.send(steps(2, [1.0], run="old"))
            await deaf.stuck(writer, step)
            assert await stored(server) == 1
            for stream in (old, writer):
                await stream.close()

    serving(test())
