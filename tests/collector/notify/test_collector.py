"""A collector with --notify-url, and `foreshock notify --test`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from foreshock_collector.commands import cli
from foreshock_collector.config import ConfigError, config_from
from foreshock_collector.notify import notifier
from foreshock_collector.server import Server
from tests.support.streams import Stream, config, families, hello, serving, steps, value
from tests.support.webhook_receiver import Receiver, receiving


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "_EVALUATION_SECONDS", 0.02)


def test_a_run_that_fails_is_notified_and_counted_and_a_healthy_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key\n")

    async def test() -> None:
        async with receiving() as receiver:
            settings = {"notify_url": receiver.url, "notify_secret": str(tmp_path / "secret")}
            changed = config(tmp_path, public_url="https://f.example/", metrics_cache_seconds=0, **settings)
            async with Server(changed) as server:
                healthy, stream = Stream(server), Stream(server)
                await healthy.send(hello("healthy"), steps(1, [1.0] * 40, run="healthy"))
                await healthy.stored(40)
                await stream.send(hello(), steps(1, [1.0] * 40 + [math.nan]))
                await stream.stored(41)
                request, body = await receiver.requests.get()
                time, digest = (part.partition("=")[2] for part in request.headers["Foreshock-Signature"].split(","))
                assert digest == hmac.new(b"key", f"{time}.".encode() + body, hashlib.sha256).hexdigest()
                (alert,) = json.loads(body)["alerts"]
                assert alert["labels"]["alertname"] == "ForeshockSuddenNonFinite"
                assert (alert["labels"]["run"], alert["status"]) == ("r", "firing")
                assert alert["annotations"]["since_step"] == "40"
                assert alert["annotations"]["runbook_url"] == "https://f.example/runbooks/ForeshockSuddenNonFinite"
                found = await families(server)
                while value(found, "foreshock_collector_notifications", result="sent") == 0:
                    found = await families(server)
                assert value(found, "foreshock_collector_notifications_pending") == 0
                await stream.close()
                await healthy.close()
            assert receiver.requests.empty()

    serving(test())


def test_a_collector_that_stops_first_sends_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `foreshock run --embedded` does when its job ends."""
    monkeypatch.setattr(notifier, "_EVALUATION_SECONDS", 3600.0)

    async def test() -> None:
        async with receiving() as receiver, Server(config(tmp_path, notify_url=receiver.url)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0] * 40 + [math.nan]))
            await stream.stored(41)
            await stream.close()
            assert receiver.requests.empty()
            await server.__aexit__(None, None, None)
            assert (await receiver.next())["status"] == "firing"

    serving(test())


def test_an_alert_that_holds_when_a_collector_comes_back_is_sent_again(tmp_path: Path) -> None:
    async def test() -> None:
        fingerprints = []
        async with receiving() as receiver:
            async with Server(config(tmp_path, notify_url=receiver.url)) as server:
                stream = Stream(server)
                await stream.send(hello(), steps(1, [1.0] * 40 + [math.nan]))
                await stream.stored(41)
                await stream.close()
                fingerprints.append((await receiver.next())["alerts"][0]["fingerprint"])
            async with Server(config(tmp_path, notify_url=receiver.url)) as server:
                (alert,) = (await receiver.next())["alerts"]
                fingerprints.append(alert["fingerprint"])
                # Also when it could be sent before the port was known.
                assert alert["annotations"]["page_url"] == f"{server.url}/run/r"
        assert len(set(fingerprints)) == 1

    serving(test())


def test_a_collector_that_cannot_start_notifies_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving() as receiver:
            async with Server(config(tmp_path)) as server:
                stream = Stream(server)
                await stream.send(hello(), steps(1, [1.0] * 40 + [math.nan]))
                await stream.stored(41)
                await stream.close()
            with socket.create_server(("127.0.0.1", 0)) as taken:
                changed = replace(config(tmp_path, notify_url=receiver.url), http_port=taken.getsockname()[1])
                with pytest.raises(ConfigError, match="--http-port"):
                    await Server(changed).__aenter__()
            assert receiver.requests.empty()

    serving(test())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--notify-url", "ftp://host/s3cret"], "begins with http:// or https://"),
        (["--notify-url", "http://:80/"], "begins with http:// or https://"),
        (["--notify-url", "http://h:x/s3cret"], "begins with http:// or https://"),
        (["--notify-secret", "file"], "requires --notify-url"),
        (["--notify-url", "http://h/", "--notify-format", "xml"], "alertmanager or slack or teams, not 'xml'"),
    ],
)
def test_a_wrong_setting_is_named_and_no_address_is_repeated(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        config_from(arguments, {})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(("content", "problem"), [(None, "No such file"), (" \n", "is empty")])
def test_a_secret_that_cannot_be_used_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)

    async def test() -> None:
        async with Server(config(tmp_path, notify_url="http://127.0.0.1:9/", notify_secret=str(tmp_path / "secret"))):
            pass

    with pytest.raises(ConfigError, match=problem):
        serving(test())


def notify(*arguments: str, reply: Callable[[web.Request], web.Response] | None = None) -> tuple[int, Receiver]:
    """`foreshock notify` against a receiver, whose address replaces URL."""

    async def test() -> tuple[int, Receiver]:
        async with receiving() as receiver:
            receiver.replies = [reply] if reply else []
            given = [argument.replace("URL", receiver.url) for argument in arguments]
            return await asyncio.to_thread(cli.notify, given), receiver

    return asyncio.run(asyncio.wait_for(test(), 60))


def posted(receiver: Receiver) -> tuple[str, Any]:
    request, body = receiver.requests.get_nowait()
    assert receiver.requests.empty()
    return request.path, json.loads(body)


def test_a_test_goes_the_way_of_a_real_notification_and_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    code, receiver = notify("--test", "--url", "URL")
    path, message = posted(receiver)
    assert (code, path) == (0, "/hook/s3cret")
    assert message["commonLabels"]["alertname"] == "TestNotification"
    assert "This is a test" in message["commonAnnotations"]["summary"]
    out = capsys.readouterr().out
    assert out.startswith("test notification accepted by http://127.0.0.1:")
    assert out.endswith(": HTTP 200 ok\n")
    assert "s3cret" not in out


def test_a_test_uses_the_collectors_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    monkeypatch.setenv("FORESHOCK_COLLECTOR_NOTIFY_FORMAT", "slack")
    code, receiver = notify("--test", "--url", "URL", "--secret", str(tmp_path / "secret"))
    request, body = receiver.requests.get_nowait()
    assert (code, json.loads(body).keys()) == (0, {"text"})
    assert request.headers["Foreshock-Signature"].startswith("t=")


def test_a_test_to_alertmanager_is_what_prometheus_posts(capsys: pytest.CaptureFixture[str]) -> None:
    code, receiver = notify("--test", "--alertmanager", "URL/")
    path, (alert,) = posted(receiver)
    assert (code, path) == (0, "/hook/s3cret/api/v2/alerts")
    assert alert.keys() == {"labels", "annotations", "startsAt", "endsAt", "generatorURL"}
    assert alert["startsAt"] < alert["endsAt"]
    assert "look for it" in capsys.readouterr().out


def test_a_test_that_is_refused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = notify("--test", "--url", "URL", reply=lambda _: web.Response(status=403, text="no\x1b[2J team"))
    assert code == 1
    out = capsys.readouterr().out
    assert out.startswith("test notification not accepted by")
    assert out.endswith("HTTP 403 no [2J team\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--test"),
        (["--test"], "no address"),
        (["--test", "--url", "host/s3cret"], "must begin with http"),
        (["--test", "--url", "http://h/", "--alertmanager", "http://h/"], "not allowed with"),
        (["--test", "--url", "http://h/", "--secret", "missing"], "cannot be read"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.notify(arguments) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "s3cret" not in error
