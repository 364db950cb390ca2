"""What ranks decide from what each has posted, and how they hear of it."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from foreshock._attach.agreement import Agreement, RankProposal, agree, decide
from foreshock._errors import AttachError

GOOD = RankProposal(version="1.0", clip="norm 1", experiment="digits", local_norms=True)


def decided(*postings: RankProposal | None) -> Agreement:
    return decide(list(postings), run="r", launch="l", timeout=60.0)


def test_ranks_that_bring_the_same_watch_together() -> None:
    assert decided(GOOD, GOOD, GOOD) == Agreement(run="r", launch="l")


def test_a_rank_that_never_came_is_named_with_the_way_out() -> None:
    assert decided(GOOD, None).error == "rank 1 did not call foreshock.attach within 60 s; call it on every rank"
    assert decided(None, GOOD, None).error.startswith("ranks 0, 2 did not call")


def test_of_many_missing_ranks_the_first_are_named() -> None:
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8, ... did not" in decided(GOOD, *[None] * 99).error


def test_one_disabled_rank_disables_all_and_is_named() -> None:
    decision = decided(GOOD, replace(GOOD, disabled=True), GOOD)
    assert decision.disabled == "FORESHOCK_DISABLED is set on rank 1" and not decision.error


def test_one_failed_rank_disables_all_and_says_why() -> None:
    decision = decided(GOOD, GOOD, replace(GOOD, error="clip: must be positive"))
    assert decision.disabled == "attach failed on rank 2: clip: must be positive" and not decision.error


@pytest.mark.parametrize("spoken", [replace(GOOD, disabled=True), replace(GOOD, error="optimizer: wrong")])
def test_what_a_rank_has_said_goes_before_what_is_missing_or_differs(spoken: RankProposal) -> None:
    decision = decided(GOOD, replace(GOOD, clip="none"), spoken, None)
    assert decision.disabled and not decision.error


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip", "norm 2"),
        ("skip", True),
        ("dry_run", True),
        ("experiment", "other"),
        ("local_norms", False),
        ("version", "2.0"),
    ],
    ids=lambda v: str(v),
)
def test_a_setting_that_differs_is_named_with_both_values_and_ranks(setting: str, value: Any) -> None:
    other = replace(GOOD, **{setting: value})
    error = decided(GOOD, GOOD, other, other).error
    assert error == (
        f"{setting} differs: {getattr(GOOD, setting)} on rank 0, {value} on ranks 2, 3; "
        "it must be the same on every rank"
    )


def test_a_taken_hook_on_one_rank_leaves_local_norms_out_on_all() -> None:
    taken = replace(GOOD, needs_comm_hook=True, comm_hook_taken=True)
    decision = decided(GOOD, taken)
    assert decision.local_norms_missing and not decision.local_norms and not decision.error


def test_a_hook_of_the_scripts_own_prevents_nothing_where_no_hook_is_needed() -> None:
    decision = decided(GOOD, replace(GOOD, comm_hook_taken=True))
    assert decision.local_norms and not decision.by_bucket and not decision.local_norms_missing


def test_one_model_that_needs_the_hook_makes_all_ranks_use_it() -> None:
    decision = decided(GOOD, replace(GOOD, needs_comm_hook=True))
    assert decision.by_bucket and decision.local_norms and not decision.local_norms_missing


def test_no_local_norms_where_no_rank_wants_them() -> None:
    quiet = replace(GOOD, local_norms=False)
    assert not decided(quiet, quiet).local_norms


def test_a_history_is_asked_for_only_where_every_rank_resumes() -> None:
    resumes = replace(GOOD, resumes=True)
    assert decided(resumes, resumes).resumes
    assert not decided(resumes, GOOD).resumes and not decided(GOOD, resumes).resumes


class Ranks:
    """Agree in threads of one process, over a store in memory."""

    def __init__(self) -> None:
        self.store = HashStore()
        self.heard: dict[int, Agreement | AttachError] = {}

    def agree(self, rank: int, posting: RankProposal, *, size: int, timeout: float = 30.0) -> None:
        try:
            self.heard[rank] = agree(
                self.store,
                rank=rank,
                world_size=size,
                proposal=posting,
                run="r" if rank == 0 else "",
                launch="l" if rank == 0 else "",
                timeout=timeout,
            )
        except AttachError as error:
            self.heard[rank] = error

    def together(self, *postings: RankProposal, timeout: float = 30.0) -> list[Agreement | AttachError]:
        threads = [
            threading.Thread(
                target=self.agree, args=(rank, posting), kwargs={"size": len(postings), "timeout": timeout}
            )
            for rank, posting in enumerate(postings)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self.heard[rank] for rank in range(len(postings))]


def test_all_ranks_hear_rank_0s_names() -> None:
    assert Ranks().together(GOOD, GOOD, GOOD) == [Agreement(run="r", launch="l")] * 3


def test_all_ranks_begin_with_the_history_that_rank_0_has_or_with_none() -> None:
    early, late = replace(GOOD, history={"mean": 0.1, "learning_rate": None}), replace(GOOD, history={"mean": 0.3})
    for first, second, expected in ((early, late, early), (early, GOOD, early), (GOOD, late, GOOD)):
        heard = Ranks().together(first, second)
        assert [each.history for each in heard if isinstance(each, Agreement)] == [expected.history] * 2


def test_ranks_that_differ_raise_the_same_everywhere() -> None:
    heard = Ranks().together(GOOD, replace(GOOD, clip="none"))
    assert [type(each) for each in heard] == [AttachError] * 2
    assert str(heard[0]) == str(heard[1]) and "clip differs" in str(heard[0])


@pytest.mark.parametrize("out", [replace(GOOD, disabled=True), replace(GOOD, error="broken")], ids=["off", "failed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_out_waits_for_nobody_and_is_heard_by_those_who_come_later(out: RankProposal, rank: int) -> None:
    ranks = Ranks()
    # An hour: were it to wait, this test would end by its time limit.
    ranks.agree(rank, out, size=2, timeout=3600.0)
    ranks.agree(1 - rank, GOOD, size=2, timeout=3600.0)
    for decision in ranks.heard.values():
        assert isinstance(decision, Agreement) and decision.disabled and f"on rank {rank}" in decision.disabled


def test_a_rank_0_that_never_comes_is_named_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock._attach.agreement._GRACE_SECONDS", 0.0)
    ranks = Ranks()
    ranks.agree(1, GOOD, size=2, timeout=0.1)
    assert "rank 0 did not call foreshock.attach within 0.1 s" in str(ranks.heard[1])


def test_once_a_rank_has_given_up_the_ones_that_come_later_give_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock._attach.agreement._GRACE_SECONDS", 0.0)
    ranks = Ranks()
    ranks.agree(1, GOOD, size=2, timeout=0.1)
    ranks.agree(0, GOOD, size=2, timeout=3600.0)
    assert isinstance(ranks.heard[0], AttachError) and str(ranks.heard[0]) == str(ranks.heard[1])


def test_a_rank_of_another_version_is_told_so_whatever_it_posts() -> None:
    ranks = Ranks()
    ranks.store.set("1/rank/1", json.dumps(asdict(replace(GOOD, version="9.9")) | {"color": "red"}))
    ranks.agree(0, GOOD, size=2)
    assert "version differs: 1.0 on rank 0, 9.9 on rank 1" in str(ranks.heard[0])


def test_a_store_that_is_gone_is_an_attach_error() -> None:
    class Gone(HashStore):
        def add(self, *_: object) -> int:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(AttachError, match=r"store is unreachable: a rank exited.*Connection reset"):
        agree(Gone(), rank=0, world_size=2, proposal=GOOD, run="r", launch="l", timeout=1.0)


def test_the_stores_own_timeout_is_left_alone() -> None:
    ranks = Ranks()
    ranks.store.set_timeout(timedelta(seconds=1234))
    ranks.agree(0, GOOD, size=1)
    assert ranks.store.timeout == timedelta(seconds=1234)  # type: ignore[attr-defined]
