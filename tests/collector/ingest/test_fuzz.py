"""Whatever a run does and a recorder sends, the collector answers, in finite numbers; `make fuzz` does more."""

from __future__ import annotations

import pytest
from hypothesis import given

from benchmarks.fuzz import histories, messages
from benchmarks.fuzz.live import unmuffled
from tests.support.fuzzing import bounded


@pytest.mark.exhaustive
@bounded(600)
@given(histories.histories)
def test_any_recorded_history_is_diagnosed(history: histories.History) -> None:
    with unmuffled():
        histories.diagnosed(history)


@pytest.mark.exhaustive
@bounded(200)
@given(histories.histories)
def test_any_history_is_taken_in_stored_and_shown_across_restarts(history: histories.History) -> None:
    with unmuffled():
        histories.live(history)


@pytest.mark.exhaustive
@bounded(250)
@given(messages.conversations)
def test_any_message_is_taken_or_refused(told: list[messages.Said]) -> None:
    with unmuffled():
        messages.conversation(told)


def test_an_error_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector swallows what goes wrong in a run; here nothing is."""
    monkeypatch.setattr("foreshock_collector.state.evaluator.Evaluator.check_stall", lambda *_, **__: 1 / 0)
    with unmuffled(), pytest.raises(AssertionError, match="evaluate"):
        messages.conversation([messages.Said(kind="hello", rank=0, changes=[])])
