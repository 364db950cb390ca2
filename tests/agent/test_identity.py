"""Names of runs that a process gives itself."""

from __future__ import annotations

from foreshock._attach.identity import free_name


def test_models_of_one_process_are_named_in_the_order_in_which_they_are_attached() -> None:
    assert free_name("gan", set()) == "gan"
    assert free_name("gan", {"other", "gan"}) == "gan-2"
    assert free_name("gan", {"gan", "gan-2", "gan-4"}) == "gan-3"
