"""Records that come late, or in another order than they were made: none counts as lost that comes before its step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.records.gaps import count_up_to, gaps_after, in_gaps
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps

Gaps = list[tuple[int, int]]


@pytest.mark.parametrize(
    ("gaps", "position", "sequences", "left"),
    [
        ([], 0, [1, 2, 3], []),
        ([], 0, [11, 12], [(1, 10)]),
        ([], 5, [7, 9, 10], [(6, 6), (8, 8)]),
        ([(1, 10)], 20, [1, 2, 3], [(4, 10)]),
        ([(1, 10)], 20, [5], [(1, 4), (6, 10)]),
        ([(1, 4), (6, 10)], 20, [3, 4, 6, 7, 25], [(1, 2), (8, 10), (21, 24)]),
        ([(1, 10)], 20, list(range(1, 11)), []),
        ([(2, 2**52)], 2**52 + 1, [7], [(2, 6), (8, 2**52)]),
    ],
)
def test_gaps_are_what_has_not_come(gaps: Gaps, position: int, sequences: list[int], left: Gaps) -> None:
    assert gaps_after(gaps, position, np.array(sequences)) == left


def test_missing_records_are_counted_up_to_a_step() -> None:
    gaps = [(1, 4), (6, 10), (20, 2**52)]
    assert count_up_to(gaps, 0) == (0, gaps)
    assert count_up_to(gaps, 7) == (6, [(8, 10), (20, 2**52)])
    assert count_up_to(gaps, 2**53) == (9 + 2**52 - 19, [])
    assert in_gaps(gaps, np.array([4, 5, 6, 19, 20])).tolist() == [True, False, True, False, True]


class Collector:
    """A collector of one run of some ranks, which can start again."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.path, self.clock = folder / "db", Clock()
        self.start()
        for rank in range(ranks):
            place = pb.Topology(rank=rank, world_size=ranks)
            self.intake.apply(hello(instance=f"r-{rank}", topology=place), self.session)

    def start(self) -> None:
        self.store, self.session = Store(self.path), Session()
        self.session.registered |= {"r-0", "r-1"}
        self.runs = self.store.load(self.clock())
        self.intake = Intake(self.runs, self.store, self.clock, ended_seconds=900.0, silent=900.0)

    def send(self, rank: int, first: int, *losses: float) -> None:
        count = len(losses)
        batch = steps(first, [1.0] * count, instance=f"r-{rank}", loss=losses, flags=[pb.LOSS_OBSERVED] * count)
        self.intake.apply(batch, self.session)

    def commit(self, after: float = 0.0) -> None:
        self.clock.now += after
        self.intake.commit()

    @property
    def run(self) -> Run:
        found = self.runs.get("r")
        assert found is not None
        return found

    def counts(self) -> tuple[int, int]:
        """Steps, and records that were lost."""
        return self.run.totals.counters["steps"], self.run.totals.dropped["ring_overrun"]

    def losses(self) -> list[float | None]:
        """As they are stored."""
        return list(self.store.steps("r", attempt=0, after=0, limit=100)["loss"])


def test_batches_in_another_order_lose_nothing(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 1)
    collector.send(0, 11, *[1.0] * 10)
    collector.send(0, 1, *[2.0] * 10)
    collector.send(0, 16, *[3.0] * 10)
    collector.commit()
    assert collector.counts() == (25, 0)
    assert collector.losses() == [2.0] * 10 + [1.0] * 10 + [3.0] * 5
    collector.store.close()


def test_batches_exchanged_around_a_commit_lose_nothing(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 2)
    for rank in (0, 1):
        collector.send(rank, 1, *[1.0] * 10)
        collector.send(rank, 21, *[3.0] * 10)
    collector.commit()
    assert collector.counts() == (10, 0)
    for rank in (0, 1):
        collector.send(rank, 11, *[2.0] * 10)
    collector.commit(after=1.0)
    assert collector.counts() == (30, 0)
    assert collector.losses() == [1.0] * 10 + [2.0] * 10 + [3.0] * 10
    collector.store.close()


def test_what_does_not_come_before_its_step_is_lost_once(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 1)
    collector.send(0, 11, *[1.0] * 10)
    collector.send(0, 5, *[2.0] * 2)
    collector.commit()
    assert collector.counts() == (12, 8)
    collector.send(0, 1, *[2.0] * 10)
    collector.commit(after=20.0)
    assert collector.counts() == (12, 8)
    collector.store.close()


def test_a_gap_that_waits_for_its_steps_outlives_the_collector(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 2)
    collector.send(1, 1, 1.0)
    collector.send(0, 4, 1.0, 1.0)
    collector.commit()
    assert collector.counts() == (1, 1)
    collector.store.close()
    collector.start()
    collector.send(0, 2, 1.0)
    collector.send(1, 2, *[1.0] * 4)
    collector.commit(after=3.0)
    assert collector.counts() == (5, 2)
    collector.store.close()


def test_a_rank_that_leaves_out_every_other_record_costs_little(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 2)
    for sequence in range(2, 402, 2):
        collector.send(0, sequence, 1.0)
    (instance,) = (each for each in collector.run.newest.instances.values() if each.rank == 0)
    assert len(instance.gaps) == 64
    collector.commit(after=20.0)
    assert collector.counts() == (200, 200)
    collector.store.close()


def test_what_comes_late_is_counted_before_it_is_acknowledged(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 2)
    collector.send(0, 1, *[2.0] * 2090)
    collector.clock.now += 12.0
    # More than the buffer has room for: all that is due is finalized, and committed at once.
    flags = [pb.LOSS_OBSERVED] * 2099 + [pb.INCOMPLETE]
    losses = [2.0] * 2059 + [math.nan] + [2.0] * 40
    batch = steps(1, [1.0] * 2100, instance="r-1", loss=losses, flags=flags)
    collector.intake.apply(batch, collector.session)
    collector.store.close()
    collector.start()
    totals, acknowledged = collector.run.totals, collector.intake.positions(collector.session)
    assert [each.sequence for each in acknowledged] == [2090, 2100]
    assert (totals.nonfinite["loss nan"], totals.dropped["never_finished"]) == (1, 1)
    collector.store.close()


def test_records_that_fill_a_gap_bring_what_they_measured_of_the_layers_weights(tmp_path: Path) -> None:
    collector = Collector(tmp_path, 1)
    model = pb.ModelSummary(parameters=["a.w"], parameter_sizes=[1], layers=["a"], parameter_layers=[0])
    collector.intake.apply(hello("layered", launch_id="layered", model=model), collector.session)
    for first, ratio in ((6, 3.0), (1, 2.0), (3, 2.5), (4, 2.75), (1, 9.0)):
        batch = steps(first, [1.0] * 2, run="layered", weight_rows=[1], update_layer_ratios=[ratio])
        collector.intake.apply(batch, collector.session)
    run = collector.runs.get("layered")
    assert run is not None
    kept = run.newest.buffer.weights.between(1, 10)
    assert kept.sequences.tolist() == [2, 4, 5, 7]
    assert kept.block("update_layer_ratios")[:, 0].tolist() == [2.0, 2.5, 2.75, 3.0]
    collector.store.close()


@pytest.mark.parametrize(("loss", "kind"), [(math.nan, "loss nan"), (math.inf, "loss inf")])
def test_a_loss_that_is_not_finite_and_comes_after_its_step_is_counted_once(
    tmp_path: Path, loss: float, kind: str
) -> None:
    collector = Collector(tmp_path, 2)
    collector.send(0, 1, *[2.0] * 5)
    collector.commit(after=12.0)
    assert collector.counts() == (5, 0) and collector.run.totals.nonfinite[kind] == 0
    collector.send(1, 1, 2.0, 2.0, loss, 2.0, 2.0)
    for _ in range(2):
        collector.commit(after=1.0)
    nonfinite = {name: count for name, count in collector.run.totals.nonfinite.items() if count}
    assert (nonfinite, collector.run.totals.last["nonfinite"]) == ({kind: 1}, collector.clock() - 1.0)
    assert collector.losses() == [2.0, 2.0, None, 2.0, 2.0] and collector.counts() == (5, 0)
    # Sent again after a restart.
    collector.store.close()
    collector.start()
    collector.send(1, 1, 2.0, 2.0, loss, 2.0, 2.0)
    collector.commit(after=1.0)
    assert collector.run.totals.nonfinite[kind] == 1
    collector.store.close()
