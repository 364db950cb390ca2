"""How often the collector asks recorders to send."""

from __future__ import annotations

import math

import pytest

from foreshock_collector.ingest.flow import MOST_SECONDS, Flow, next_interval
from foreshock_collector.records.buffer import RecordBuffer
from tests.support.clock import Clock
from tests.support.job_in_memory import Job


@pytest.mark.parametrize(
    ("seconds", "busy", "messages", "expected"),
    [
        (1.0, 0.9, 1000.0, 1.5),
        (4.9, 0.9, 1000.0, MOST_SECONDS),
        (1.5, 0.5, 1000.0, 1.5),
        (1.5, 0.1, 1000.0, 1.0),
        (1.2, 0.1, 1000.0, 1.0),
        (1.0, 1.0, 50.0, 1.0),
    ],
)
def test_the_interval_follows_the_load(seconds: float, busy: float, messages: float, expected: float) -> None:
    assert next_interval(seconds, busy=busy, messages=messages, least=1.0) == expected


class Process:
    """A process and its event loop, as a test says they are."""

    def __init__(self, least: float = 1.0) -> None:
        self.now, self.used, self.messages = Clock(), Clock(), 0
        self.flow = Flow(least, self.now, self.used)

    def second(self, *, used: float, late: float = 0.0, messages: int = 1000) -> float:
        self.now.now += 1.0
        self.used.now += used
        self.messages += messages
        self.flow.add_delay(late)
        self.flow.adapt(self.messages)
        return self.flow.seconds


def test_a_busy_collector_is_sent_less_often_and_one_at_ease_as_often_as_before() -> None:
    process = Process()
    assert [process.second(used=0.9) for _ in range(5)] == [1.5, 2.25, 3.375, 5.0, 5.0]
    assert [process.second(used=0.2) for _ in range(5)][-1] == 1.0


def test_a_collector_whose_processor_others_use_is_busy_too() -> None:
    assert Process().second(used=0.3, late=0.8) == 1.5


def test_an_interval_of_more_than_the_limit_stays() -> None:
    assert Process(least=5.0).second(used=0.9) == 5.0


def test_a_job_whose_steps_stay_in_memory_for_a_moment_is_not_sent_less_often() -> None:
    process = Process()
    for _ in range(5):
        process.second(used=0.9)
    assert process.flow.seconds_for(math.inf) == 5.0
    assert process.flow.seconds_for(8.0) == 2.0
    assert process.flow.seconds_for(0.1) == 1.0


def test_how_long_steps_stay_in_memory_follows_the_pace_of_the_job() -> None:
    job = Job(ranks=2)
    assert job.run.newest.held_seconds() == math.inf
    job.train(3)
    pace = job.run.newest.steps[-1].duration_seconds
    assert pace is not None
    assert job.run.newest.held_seconds() == pytest.approx(pace * RecordBuffer(world_size=2, layers=0).capacity)
