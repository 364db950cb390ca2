"""A rank that the collector refuses is offered again on the same stream. Time is an argument here."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_recorder.layout import ExitReason
from foreshock_recorder.ring import Ring
from tests.support.listeners import Listener, kinds
from tests.support.rings import make_ring, step


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path)


def test_a_refused_rank_says_hello_again_ever_more_rarely_and_nothing_else(ring: Ring) -> None:
    step(ring, 1)
    listener = Listener(ring)
    asked = []
    for now in range(200):
        if listener.ask(after=1.0):
            asked.append(now)
        # Acknowledgements come every second, and each says so again.
        listener.rank.refuse("no room", listener.now, 0.5)
    assert asked == [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181]
    assert (listener.rank.refusal, ring.problem) == ("no room", "no room")


def test_once_its_hello_is_accepted_everything_is_sent_that_the_collector_lacks(ring: Ring) -> None:
    for sequence in (1, 2, 3):
        step(ring, sequence)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1, 2, 3]
    listener.rank.refuse("another stream sends this instance", listener.now, 0.5)
    assert listener.ask(after=0.9) == []
    assert kinds(listener.ask(after=0.2)) == ["hello"]
    # An acknowledgement from before that hello.
    listener.rank.refuse("another stream sends this instance", listener.now, 0.5)
    listener.store(1)
    assert listener.rank.refusal == "" and listener.sequences(after=1.0) == [2, 3]


def test_records_that_are_refused_each_time_are_not_offered_every_second(ring: Ring) -> None:
    step(ring, 1)
    listener = Listener(ring).greet()
    offered = []
    for now in range(100):
        sent = kinds(listener.ask(after=1.0))
        if "steps" in sent:
            offered.append(now)
            listener.rank.refuse("contradiction", listener.now, 0.5)
        elif "hello" in sent:
            listener.store(0)
    assert offered == [0, 2, 5, 10, 19, 36, 67, 98]


def test_a_refused_rank_that_has_exited_asks_while_the_recorder_stays(ring: Ring) -> None:
    step(ring, 1)
    ring.write_exit(ExitReason.FINISHED)
    listener = Listener(ring)
    asked = []
    for now in range(40):
        if listener.ask(after=1.0):
            asked.append(now)
        listener.rank.refuse("no room", listener.now, 0.5)
    assert asked == [0, 1, 3, 7, 12, 17, 22, 27, 32, 37]
