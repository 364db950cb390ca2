"""A step waits for ranks that lag behind, as long as that is worth it."""

from __future__ import annotations

import math

import pytest

from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import steps


class Waiting:
    """Two ranks; the first is ahead."""

    def __init__(self) -> None:
        self.buffer = RecordBuffer(world_size=2, layers=0)
        self.now = 1000.0

    def report(self, rank: int, first: int, *losses: float, after: float = 0.0) -> None:
        self.now += after
        count = len(losses)
        batch = steps(first, [1.0] * count, loss=losses, flags=[pb.LOSS_OBSERVED] * count).steps
        self.buffer.write(rank, decode(batch, 0), self.now)

    def losses(self, *, after: float) -> list[float | None]:
        """Those of the steps that are due."""
        self.now += after
        assert self.buffer.overdue(self.now) == (self.buffer.due(self.now) > self.buffer.finalized)
        return [step.loss for step in self.buffer.finalize(0, self.buffer.due(self.now))]


def test_a_rank_that_was_cut_off_for_some_seconds_is_part_of_every_step() -> None:
    ranks = Waiting()
    for rank in (0, 1):
        ranks.report(rank, 1, 1.0, 1.0)
    assert ranks.buffer.due(ranks.now) == 2
    list(ranks.buffer.finalize(0, 2))
    ranks.report(0, 3, 1.0, 1.0)
    assert ranks.losses(after=7.9) == []
    # Late, and the only rank with a NaN in its loss.
    ranks.report(1, 3, math.nan, 3.0)
    found = list(ranks.buffer.finalize(0, ranks.buffer.due(ranks.now)))
    assert [step.nan_loss for step in found] == [True, False] and found[1].loss == 2.0


@pytest.mark.parametrize("reported", [False, True])
def test_a_rank_that_has_been_silent_for_long_is_not_waited_for(reported: bool) -> None:
    ranks = Waiting()
    if reported:
        ranks.report(1, 1, 1.0)
        ranks.now += 20
    ranks.report(0, 1, 5.0)
    if reported:
        list(ranks.buffer.finalize(0, ranks.buffer.due(ranks.now)))
        ranks.report(0, 2, 5.0)
    assert ranks.losses(after=1.9) == []
    assert ranks.losses(after=0.2) == [5.0]


def test_a_rank_that_lags_is_waited_for_ten_seconds_at_most_and_a_nan_for_a_moment() -> None:
    ranks = Waiting()
    for rank in (0, 1):
        ranks.report(rank, 1, 1.0)
    list(ranks.buffer.finalize(0, 1))
    ranks.report(0, 2, 5.0)
    # It catches up, and stays behind.
    assert ranks.losses(after=9.0) == []
    ranks.now -= 9.0
    ranks.report(0, 3, math.nan)
    (second, third) = ranks.losses(after=0.4)
    assert second == 5.0 and third is not None and math.isnan(third)
    ranks.report(0, 4, 5.0)
    for _ in range(9):
        assert ranks.losses(after=1.0) == []
    assert ranks.losses(after=1.0) == [5.0]
