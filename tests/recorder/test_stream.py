"""One stream to a collector: when it is given up, and when it is tried again."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from foreshock_protos.retry import retry_metadata, retry_seconds
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import stream
from foreshock_recorder.delivery import pause_seconds
from foreshock_recorder.stream import RefusedError, Send, UnreachableError, run_stream
from tests.support.fake_collector import FakeCollector
from tests.support.waiting import free_port


async def _say_hello(send: Send) -> None:
    await send(pb.FromRecorder(hello=pb.Hello(instance="i")))
    await asyncio.Event().wait()


def _ignore(_: pb.Ack) -> None: ...


def test_a_silent_collector_is_given_up(collector: FakeCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 0.2)
    collector.answers = False
    with pytest.raises(UnreachableError, match=r"no answer for 0\.2 s"):
        asyncio.run(run_stream(collector.address, _say_hello, _ignore))


def test_a_machine_that_swallows_everything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hole, pytest.raises(UnreachableError, match="no answer"):
        asyncio.run(run_stream(f"127.0.0.1:{hole.getsockname()[1]}", _say_hello, _ignore))


def test_a_collector_that_takes_nothing_in_is_given_up_with_little_in_memory(
    collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 1.0)
    sent = 0

    async def flood(send: Send) -> None:
        nonlocal sent
        while True:
            await send(pb.FromRecorder(hello=pb.Hello(instance="i", clip="x" * 2**20)))
            sent += 1

    collector.answers = False
    collector.hold()
    with pytest.raises(UnreachableError, match="no answer"):
        asyncio.run(run_stream(collector.address, flood, _ignore))
    assert sent < 64


def test_nobody_there_is_said_soon() -> None:
    with pytest.raises(UnreachableError, match=r"refused|failed to connect"):
        asyncio.run(run_stream(f"127.0.0.1:{free_port()}", _say_hello, _ignore))


def test_a_refusal_is_not_mistaken_for_a_failure(collector: FakeCollector) -> None:
    collector.refusal = (grpc.StatusCode.PERMISSION_DENIED, "this token is for another experiment")
    with pytest.raises(RefusedError, match="this token is for another experiment"):
        asyncio.run(run_stream(collector.address, _say_hello, _ignore))


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE])
def test_what_a_collector_says_as_it_ends_a_stream_is_printable(
    collector: FakeCollector, code: grpc.StatusCode
) -> None:
    collector.refusal = (code, "no\x1b[2J\u202e\nyes")
    with pytest.raises((RefusedError, UnreachableError)) as ended:
        asyncio.run(run_stream(collector.address, _say_hello, _ignore))
    assert str(ended.value) == r"no\x1b[2J\u202e\nyes"


def test_what_a_collector_says_of_runs_is_printable(collector: FakeCollector) -> None:
    collector.renamed["crimson-otter"] = collector.refused["b-0"] = "a\x1b[2J\u202e\nb"
    texts = asyncio.run(_texts_of_answers(collector.address, "a-0", "b-0"))
    assert texts == {"a-0": (r"a\x1b[2J\u202e\nb", ""), "b-0": ("", r"a\x1b[2J\u202e\nb")}


async def _texts_of_answers(address: str, *instances: str) -> dict[str, tuple[str, str]]:
    """What a collector answers to a hello of each: the name of its run, and why it is refused."""
    texts: dict[str, tuple[str, str]] = {}
    answered = asyncio.Event()

    async def say_hello(send: Send) -> None:
        for instance in instances:
            await send(pb.FromRecorder(hello=pb.Hello(instance=instance, run="crimson-otter")))
        await answered.wait()

    def take(ack: pb.Ack) -> None:
        texts.update({position.instance: (position.run, position.refused) for position in ack.positions})
        if len(texts) == len(instances):
            answered.set()

    reading = asyncio.create_task(run_stream(address, say_hello, take))
    await answered.wait()
    reading.cancel()
    return texts


@pytest.mark.parametrize("seconds", [0.0, 2.5])
def test_a_collector_with_too_many_streams_says_when_to_try_again(collector: FakeCollector, seconds: float) -> None:
    collector.refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
    collector.retry_seconds = seconds
    with pytest.raises(UnreachableError, match="too many streams") as busy:
        asyncio.run(run_stream(collector.address, _say_hello, _ignore))
    assert busy.value.retry_seconds == seconds


def test_details_of_a_status_that_are_no_retry_info_are_passed_over() -> None:
    ((key, value),) = retry_metadata(8, "busy", 1.25)
    assert retry_seconds([("other", "x"), (key, value)]) == 1.25
    assert [retry_seconds(each) for each in (None, [], [(key, b"\xff")], [(key, b"")])] == [None] * 4


def test_an_error_of_our_own_is_not_hidden(collector: FakeCollector) -> None:
    async def fail(_: Send) -> None:
        raise KeyError("rank")

    with pytest.raises(KeyError):
        asyncio.run(run_stream(collector.address, fail, _ignore))


def test_the_first_retry_is_soon_the_later_ones_are_spread_and_a_refusal_waits() -> None:
    assert pause_seconds(0, 0.999, refused=False) < 1
    assert [pause_seconds(n, 0.5, refused=False) for n in (0, 1, 3, 5, 10_000)] == [0.5, 1.0, 4.0, 15.0, 15.0]
    asked = [pause_seconds(9, share, refused=False, asked_seconds=20.0, fill_seconds=1.0) for share in (0.0, 0.5)]
    assert asked == [20.0, 30.0] and pause_seconds(0, 0.0, refused=False, asked_seconds=1e9) == 60.0
    assert pause_seconds(9, 0.5, refused=False, asked_seconds=-1.0) == 15.0
    assert 15 <= pause_seconds(0, 0.0, refused=True) < pause_seconds(9, 0.999, refused=True) < 45
