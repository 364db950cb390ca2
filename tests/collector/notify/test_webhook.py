"""A message on its way: signed, sent again, never to another address, and bounded."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from foreshock_collector.notify import outbox as outbox_module
from foreshock_collector.notify import webhook as webhook_module
from foreshock_collector.notify.message import body_of
from foreshock_collector.notify.outbox import Outbox, pause
from foreshock_collector.notify.run_alerts import Notification
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.notify.webhook import seconds_until, webhook
from tests.support.webhook_receiver import Receiver, Reply, receiving

PAGE = "http://monitor:9327"


def notification(run: str = "r", *, resolved: float | None = None, alert: str = "ForeshockRunDied") -> Notification:
    return Notification(
        labels={"alertname": alert, "experiment": "e", "run": run, "severity": "critical"},
        annotations={
            "summary": "A run died.",
            "description": "Run <r> & co.",
            "run": run,
            "runbook_url": f"{PAGE}/runbooks/{alert}",
            "page_url": f"{PAGE}/run/{run}",
        },
        started_seconds=1_800_000_000.25,
        resolved_seconds=resolved,
    )


def status(code: int, **headers: str) -> Reply:
    return lambda _: web.Response(status=code, headers=headers)


@asynccontextmanager
async def sending(
    receiver: Receiver, secret: bytes | None = None
) -> AsyncIterator[tuple[Outbox, NotificationStatistics]]:
    counts = NotificationStatistics()
    async with webhook(receiver.url, secret) as client:
        outbox = Outbox(client, counts, lambda: 1_800_000_001.0, form="alertmanager", url=lambda: PAGE)
        task = asyncio.create_task(outbox.send_forever())
        try:
            yield outbox, counts
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@pytest.fixture
def errors_expected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The only errors are of messages that were dropped."""
    yield
    records = [record for when in ("setup", "call") for record in caplog.get_records(when)]
    assert all(
        re.search("dropped|run broken failed", record.getMessage())
        for record in records
        if record.levelno >= logging.ERROR
    )


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "pause", lambda *_: 0.0)


def test_a_message_is_signed_over_its_time_and_body() -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver, b"key") as (outbox, counts):
            outbox.add([notification()])
            request, body = await receiver.requests.get()
            time, digest = (part.partition("=")[2] for part in request.headers["Foreshock-Signature"].split(","))
            assert time == "1800000001"
            assert digest == hmac.new(b"key", f"{time}.".encode() + body, hashlib.sha256).hexdigest()
            await until(lambda: counts.results == {"sent": 1, "failed": 0})
            assert counts.pending == 0

    run(test())


def test_a_message_is_sent_again_until_it_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, counts):
            receiver.replies = [status(500), status(429), status(503)]
            outbox.add([notification()])
            bodies = [(await receiver.requests.get())[1] for _ in range(4)]
            assert len(set(bodies)) == 1
            await until(lambda: counts.pending == 0)
            assert counts.results == {"sent": 1, "failed": 0}

    run(test())
    assert len([r for r in caplog.records if "trying again" in r.getMessage()]) == 1


def test_a_receiver_that_is_away_delays_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        counts = NotificationStatistics()
        with socket.socket() as reserved:  # bound and not listening: connections are refused
            reserved.bind(("127.0.0.1", 0))
            async with webhook(f"http://user:s3cret@127.0.0.1:{reserved.getsockname()[1]}/s3cret", None) as client:
                outbox = Outbox(client, counts, lambda: 0.0, form="alertmanager", url=lambda: PAGE)
                outbox.add([notification()])
                await outbox.send_once()
                await outbox.send_once()
        assert (counts.results, counts.pending) == ({"sent": 0, "failed": 0}, 1)

    run(test())
    assert "ClientConnectorError" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_refusal_drops_the_message_and_a_redirection_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with receiving() as receiver, receiving() as elsewhere, sending(receiver) as (outbox, counts):
            receiver.replies = [status(403), status(302, Location=elsewhere.url), status(307, Location=elsewhere.url)]
            for name in ("a", "b", "c", "d"):
                outbox.add([notification(name)])
            assert [(await receiver.next())["groupLabels"]["run"] for _ in range(4)] == ["a", "b", "c", "d"]
            await until(lambda: counts.results == {"sent": 1, "failed": 3})
            assert elsewhere.requests.empty()

    run(test())
    assert [r.levelno for r in caplog.records if "dropped" in r.getMessage()] == [logging.ERROR] * 3
    assert "s3cret" not in caplog.text


def test_an_answer_that_repeats_the_address_brings_no_secret_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with receiving() as receiver:
            receiver.url += "?key=s3cret"
            async with sending(receiver) as (outbox, counts):
                receiver.replies = [lambda request: web.Response(status=404, text=f"Cannot POST {request.path_qs}")]
                outbox.add([notification()])
                await until(lambda: counts.results["failed"] == 1)

    run(test())
    assert "HTTP 404 Cannot POST ...?..." in caplog.text
    assert "s3cret" not in caplog.text


def test_of_an_alert_that_waits_only_the_newest_state_is_sent_and_a_run_is_one_message() -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, _):
            outbox.add([notification(), notification(alert="ForeshockTrainingFault")])
            outbox.add([notification(resolved=1_800_000_060.0)])
            message = await receiver.next()
            assert message["status"] == "firing"
            assert [(each["labels"]["alertname"], each["status"]) for each in message["alerts"]] == [
                ("ForeshockRunDied", "resolved"),
                ("ForeshockTrainingFault", "firing"),
            ]

    run(test())


def test_what_is_added_during_an_attempt_is_sent_next() -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, counts):

            def resolve(_: web.Request) -> web.Response:
                outbox.add([notification(resolved=1_800_000_060.0)])
                return web.Response()

            receiver.replies = [resolve]
            outbox.add([notification()])
            assert [(await receiver.next())["status"] for _ in range(2)] == ["firing", "resolved"]
            await until(lambda: counts.results["sent"] == 2)

    run(test())


def test_a_message_that_the_receiver_cannot_take_does_not_hold_up_others() -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, _):
            receiver.replies = [status(500)]
            outbox.add([notification("poison")])
            outbox.add([notification("other")])
            assert [(await receiver.next())["groupLabels"]["run"] for _ in range(3)] == ["poison", "other", "poison"]

    run(test())


def test_an_error_in_one_message_is_logged_and_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, counts):
            outbox.add([replace(notification("broken"), started_seconds=math.nan)])
            outbox.add([notification("other")])
            assert (await receiver.next())["groupLabels"]["run"] == "other"
            await until(lambda: counts.results == {"sent": 1, "failed": 1})

    run(test())
    assert "notification about run broken failed" in caplog.text


def test_messages_that_wait_are_bounded_and_the_oldest_goes_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        monkeypatch.setattr(outbox_module, "_MOST_RUNS", 2)
        counts = NotificationStatistics()
        async with receiving() as receiver, webhook(receiver.url, None) as client:
            outbox = Outbox(client, counts, lambda: 0.0, form="alertmanager", url=lambda: PAGE)
            for name in ("a", "b", "c"):
                outbox.add([notification(name)])
            assert (counts.results, counts.pending) == ({"sent": 0, "failed": 1}, 2)
            await outbox.send_once()
            assert [(await receiver.next())["groupLabels"]["run"] for _ in range(2)] == ["b", "c"]

    run(test())
    assert "run a to" in caplog.text


def test_a_message_that_is_being_sent_is_not_dropped_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(outbox_module, "_MOST_RUNS", 2)
        async with receiving() as receiver, sending(receiver) as (outbox, counts):

            def add(_: web.Request) -> web.Response:
                outbox.add([notification("c")])
                return web.Response()

            receiver.replies = [add]
            outbox.add([notification("a")])
            outbox.add([notification("b")])
            assert [(await receiver.next())["groupLabels"]["run"] for _ in range(2)] == ["a", "c"]
            await until(lambda: counts.results == {"sent": 2, "failed": 1})

    run(test())


def test_a_receiver_that_does_not_answer_costs_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(webhook_module, "_SECONDS", 0.05)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/", None) as client:
                answer = await client.post(b"{}", 0.0)
        assert (answer.status, answer.final, str(answer)) == (0, False, "no answer within 0.05 seconds")

    run(test())


def test_pauses_have_full_jitter_and_a_limit() -> None:
    for failures, most in ((1, 2.0), (3, 8.0), (10_000, 60.0)):
        for asked, waited in ((0.0, 0.0), (30.0, 30.0), (86_400.0, 600.0)):
            pauses = [pause(failures, asked) - waited for _ in range(500)]
            assert 0 <= min(pauses) < 0.1 * most < 0.9 * most < max(pauses) <= most + 1e-9


def test_a_receiver_that_says_when_to_try_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = []

    def pause(failures: int, asked: float) -> float:
        paused.append((failures, asked))
        return 0.0

    monkeypatch.setattr(outbox_module, "pause", pause)

    async def test() -> None:
        async with receiving() as receiver, sending(receiver) as (outbox, counts):
            # The outbox's clock says 2027-01-15T08:00:01Z.
            date = {"Retry-After": "Fri, 15 Jan 2027 08:00:31 GMT"}
            receiver.replies = [status(429, **{"Retry-After": "120"}), status(503, **date), status(500)]
            outbox.add([notification()])
            await until(lambda: counts.results["sent"] == 1)

    run(test())
    assert paused == [(1, 120.0), (2, 30.0), (3, 0.0)]


@pytest.mark.parametrize("header", ["", "-1", "soon", "1e9", "9" * 30, "Fri, 15 Jan 2027 07:00:00 GMT", "\u0663"])
def test_what_a_receiver_says_wrongly_of_when_to_try_again_is_ignored(header: str) -> None:
    assert seconds_until(header, 1_800_000_001.0) == 0.0


def test_a_receiver_is_reached_through_the_proxy_unless_it_is_excepted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with receiving() as proxy, receiving() as near:
            monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/hook/s3cret"))
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            async with webhook("http://receiver.invalid/hook", None) as client:
                assert (await client.post(b"far", 0.0)).accepted
            request, body = await proxy.requests.get()
            assert (request.headers["Host"], body) == ("receiver.invalid", b"far")
            async with webhook(near.url, None) as client:
                assert (await client.post(b"near", 0.0)).accepted
            assert (await near.requests.get())[1] == b"near" and proxy.requests.empty()
            # It knows no tunnels.
            async with webhook("https://receiver.invalid/hook", None) as client:
                monkeypatch.setenv("https_proxy", proxy.url.removesuffix("/hook/s3cret"))
                answer = await client.post(b"", 0.0)
            assert (answer.final, str(answer)) == (False, "ClientHttpProxyError HTTP 404")

    run(test())


def test_a_message_to_slack_is_one_text() -> None:
    """https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks: `text`, with three signs escaped."""
    message = json.loads(body_of([notification(), notification("q", resolved=0.0)], form="slack", url=PAGE))
    assert message["text"].splitlines() == [
        "CRITICAL ForeshockRunDied: A run died. Run &lt;r&gt; &amp; co.",
        f"<{PAGE}/run/r|page> <{PAGE}/runbooks/ForeshockRunDied|runbook>",
        "RESOLVED ForeshockRunDied: A run died. Run &lt;r&gt; &amp; co.",
        f"<{PAGE}/run/q|page> <{PAGE}/runbooks/ForeshockRunDied|runbook>",
    ]
    assert message.keys() == {"text"}


def test_a_message_to_teams_is_an_adaptive_card() -> None:
    """https://adaptivecards.io/explorer: a card of version 1.2, whose body needs elements with `type` and text."""
    message = json.loads(body_of([notification("*r*"), notification("*r*", resolved=0.0)], form="teams", url=PAGE))
    ((attachment,), kind) = message["attachments"], message["type"]
    assert (kind, attachment["contentType"]) == ("message", "application/vnd.microsoft.card.adaptive")
    card = attachment["content"]
    assert (card["type"], card["version"]) == ("AdaptiveCard", "1.2")
    assert [block["text"] for block in card["body"] if block["type"] == "TextBlock"] == [
        "CRITICAL ForeshockRunDied",
        "RESOLVED ForeshockRunDied",
    ]
    runs = [run for block in card["body"] if block["type"] == "RichTextBlock" for run in block["inlines"]]
    assert runs == [{"type": "TextRun", "text": "A run died. Run <r> & co."}] * 2
    assert [link["url"] for link in card["actions"]] == [f"{PAGE}/runbooks/ForeshockRunDied"] * 2 + [f"{PAGE}/run/*r*"]


def test_a_message_is_what_alertmanager_posts() -> None:
    """The fields of https://prometheus.io/docs/alerting/latest/configuration/#webhook_config, all of them."""
    message = json.loads(body_of([notification()], form="alertmanager", url=PAGE))
    (alert,) = message.pop("alerts")
    assert message == {
        "version": "4",
        "groupKey": '{}:{"experiment": "e", "run": "r"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "foreshock",
        "groupLabels": {"experiment": "e", "run": "r"},
        "commonLabels": notification().labels,
        "commonAnnotations": notification().annotations,
        "externalURL": PAGE,
    }
    assert (
        alert.pop("fingerprint")
        == json.loads(body_of([notification()], form="alertmanager", url=""))["alerts"][0]["fingerprint"]
    )
    assert alert == {
        "status": "firing",
        "labels": notification().labels,
        "annotations": notification().annotations,
        "startsAt": "2027-01-15T08:00:00.250Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": f"{PAGE}/run/r",
    }
