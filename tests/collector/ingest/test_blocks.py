"""Blocks, in which a recorder sends the records of all its ranks: as good as batches, and as carefully checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.block_messages import RECORD, block_of
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import RefusedError, Session
from foreshock_collector.records.batch import ColumnsError, decode
from foreshock_collector.records.block import decode_block
from foreshock_collector.state import store
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.restoring import restore
from foreshock_collector.state.store import Store
from foreshock_protos.columns import RECORD_COLUMNS, WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.fuzzing import bounded
from tests.support.streams import hello, steps

LAYERS = 2
NUMBERS = st.sampled_from((0.0, -1.0, 0.25, 5e-324, 1e-200, 1e150, 1e151, -1e308, math.nan, math.inf, -math.inf))


def batch(rank: int, first: int, norms: list[float], **columns: Any) -> pb.StepBatch:
    found = steps(first, norms, instance=f"r-{rank}", **columns).steps
    if rank == 0:
        found.global_layer_norms.extend([0.5, 0.25] * len(norms))
        found.weight_rows.extend([0, len(norms) - 1])
        for place, name in enumerate(WEIGHT_BLOCKS):
            getattr(found, name).extend([1.0 + place] * 2 * LAYERS)
    return found


def block(first: int = 1, **columns: Any) -> pb.StepBlock:
    """Three steps of two ranks."""
    return block_of([batch(rank, first, [1.0, 2.0, 3.0], **columns) for rank in range(2)])


@bounded(100)
@given(st.lists(NUMBERS, min_size=3, max_size=3), st.lists(NUMBERS, min_size=3, max_size=3))
def test_a_block_is_decoded_to_what_batches_are(norms: list[float], others: list[float]) -> None:
    columns = {"loss": others, "global_nan_parameters": others, "update_ratio": norms, "reduced_sequence": [0, 1, 9]}
    batches = [batch(rank, 4, norms, local_norm=others, step=[2**60, -5, 0], **columns) for rank in range(3)]
    found = decode_block(block_of(batches), LAYERS)
    for rank in range(3):
        expected, got = decode(batches[rank], LAYERS), found.records(rank)
        for name in RECORD.names or ():
            np.testing.assert_array_equal(got.rows[name], expected.rows[name], name)
    shared = decode(batches[0], LAYERS)
    for name in ("reduced_sequence", "reduced_loss_sum"):
        np.testing.assert_array_equal(found.sums[name], shared.sums[name])
    np.testing.assert_array_equal(found.layer_norms, shared.layer_norms)
    np.testing.assert_array_equal(found.weights.sequences, shared.weights.sequences)
    np.testing.assert_array_equal(found.weights.blocks, shared.weights.blocks)


def changed(change: Callable[[Any], None]) -> pb.StepBlock:
    """A block whose records were changed on the way."""
    found = block()
    records = np.frombuffer(found.records, RECORD).reshape(3, 2).copy()
    change(records)
    found.records = records.tobytes()
    return found


def with_fields(**fields: Any) -> pb.StepBlock:
    found = block()
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def renumbered(records: Any) -> None:
    records["sequence"][1, 1] = 7


def flagged(records: Any) -> None:
    records["flags"][2, 0] = -1


def misplaced() -> pb.StepBlock:
    found = block()
    found.weight_rows[:] = [0, 3]
    return found


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            with_fields(records=block().records[:-1]),
            "records has 1103 bytes, which are no records of 3 steps and 2 ranks",
        ),
        (with_fields(records=b""), "records has 0 bytes"),
        (with_fields(steps=2**32 - 1), "no records of 4294967295 steps"),
        (with_fields(steps=1), "no records of 1 steps|are not numbered"),
        (with_fields(records=bytes(8 * 300 * 6)), "which are no records"),
        (with_fields(first_sequence=0), "first_sequence 0 is out of range"),
        (with_fields(first_sequence=2**53), "first_sequence 9007199254740992 is out of range"),
        (with_fields(first_sequence=2), "are not numbered 2, 3 and so on"),
        (changed(renumbered), "are not numbered 1, 2 and so on"),
        (changed(flagged), "flags that are out of range"),
        (with_fields(sums=block().sums[8:]), "sums has 208 bytes, not a result for each step, or none"),
        (
            with_fields(global_layer_norms=bytes(4)),
            "global_layer_norms has 4 bytes, not a value for each step and layer",
        ),
        (
            with_fields(layer_weights=bytes(4)),
            "layer_weights has 4 bytes, not 4 values for each of 2 steps and 2 layers",
        ),
        (misplaced(), "weight_rows must ascend and stay below the 3 steps"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(wrong: pb.StepBlock, says: str) -> None:
    with pytest.raises(ColumnsError, match=says):
        decode_block(wrong, LAYERS)


def test_records_of_an_older_recorder_lack_the_last_columns_and_those_of_a_newer_one_have_more() -> None:
    found = block(update_ratio=[0.5] * 3)
    words = np.frombuffer(found.records, "<i8").reshape(6, -1)
    optional = sum(column.optional for column in RECORD_COLUMNS)
    found.records = words[:, :-optional].tobytes()
    rows = decode_block(found, LAYERS).rows
    for column in RECORD_COLUMNS[-optional:]:
        assert (rows[column.name] == column.missing).all(), column.name
    found.records = np.concatenate((words, words[:, :2]), axis=1).tobytes()
    assert (decode_block(found, LAYERS).rows["update_ratio"] == 0.5).all()


class Collector:
    """An intake and its store, at one time."""

    def __init__(self, path: Path, ranks: int = 2, world_size: int = 2) -> None:
        self.path, self.clock, self.ranks, self.world_size = path, Clock(), ranks, world_size
        self.open()

    def open(self) -> None:
        self.store = Store(self.path)
        self.runs: Runs = self.store.load(self.clock())
        self.intake = Intake(self.runs, self.store, self.clock, ended_seconds=900.0, silent=900.0)
        self.session = Session()
        for rank in range(self.ranks):
            place = pb.Topology(rank=rank, world_size=self.world_size)
            model = pb.ModelSummary(layers=["a", "b"])
            self.intake.apply(hello(instance=f"r-{rank}", topology=place, model=model), self.session)

    def take(self, *blocks: pb.StepBlock) -> None:
        for each in blocks:
            self.intake.apply(pb.FromRecorder(block=each), self.session)

    def positions(self) -> list[int]:
        self.intake.commit()
        return [position.sequence for position in self.intake.positions(self.session)]

    def finalized(self) -> list[tuple[int, int]]:
        """Sequence number and number of ranks of each step."""
        self.clock.now += 5.0
        self.intake.commit()
        (run,) = self.runs
        return [(step.sequence, step.ranks) for step in run.newest.steps]


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    return Collector(tmp_path / "db")


def test_a_block_is_acknowledged_for_each_of_its_ranks_once_it_is_committed(collector: Collector) -> None:
    collector.take(block())
    assert [each.sequence for each in collector.intake.positions(collector.session)] == [0, 0]
    assert collector.positions() == [3, 3]
    assert collector.finalized() == [(1, 2), (2, 2), (3, 2)]
    assert collector.intake.statistics.records == 6


def test_a_block_that_comes_again_or_overlaps_counts_once(collector: Collector) -> None:
    collector.take(block(), block(), block(3))
    assert collector.positions() == [5, 5]
    assert collector.finalized() == [(sequence, 2) for sequence in range(1, 6)]
    (run,) = collector.runs
    assert not any(run.totals.dropped.values())


def test_ranks_that_stand_at_different_steps_get_what_is_new_to_each(collector: Collector) -> None:
    alone = block_of([batch(1, 1, [1.0, 2.0])])
    collector.take(alone, block(), block(6))
    assert collector.positions() == [8, 8]
    # What lies between has not come, of either.
    assert [sequence for sequence, _ in collector.finalized()] == [1, 2, 3, 6, 7, 8]
    (run,) = collector.runs
    assert run.totals.dropped["ring_overrun"] == 4


def test_blocks_that_wait_for_another_rank_survive_a_restart(collector: Collector) -> None:
    collector.take(block(), block_of([batch(0, 4, [4.0, 5.0])]))
    assert collector.positions() == [5, 3]
    collector.store.close()
    collector.open()
    assert collector.positions() == [5, 3]
    collector.take(block_of([batch(1, 4, [4.0, 5.0])]))
    assert collector.finalized()[-2:] == [(4, 2), (5, 2)]


def test_a_block_without_steps_shows_that_its_ranks_are_alive(collector: Collector) -> None:
    collector.take(block())
    collector.clock.now += 50.0
    found = pb.StepBlock(first_sequence=4)
    found.ranks.add(instance="r-1", backward_passes=7, dropped={"probe_error": 2})
    collector.take(found)
    (run,) = collector.runs
    zero, one = run.newest.instances[0], run.newest.instances[1]
    assert one.last_report - zero.last_report == 50.0
    assert one.backward_passes == 7
    collector.intake.commit()
    assert run.totals.dropped["probe_error"] == 2


def test_a_wrong_block_refuses_its_ranks_and_no_others(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "db")
    wrong = block_of([batch(1, 1, [1.0])])
    wrong.records = wrong.records[8:]
    collector.take(wrong, block())
    one = collector.intake.positions(collector.session)[-1]
    assert one.instance == "r-1" and "records are not numbered" in one.refused
    assert collector.positions()[0] == 3


@pytest.mark.parametrize(("names", "says"), [(["r-0", "r-0"], "same instance"), (["r-0", "x"], "has not said hello")])
def test_a_block_that_no_recorder_sends_ends_the_stream(collector: Collector, names: list[str], says: str) -> None:
    found = block()
    for rank, name in zip(found.ranks, names, strict=True):
        rank.instance = name
    with pytest.raises(RefusedError, match=says):
        collector.take(found)


def test_a_nan_in_a_block_is_urgent(collector: Collector) -> None:
    collector.take(block())
    collector.intake.commit()
    assert not collector.intake.urgent
    collector.take(block(4, local_norm=[1.0, 1.0, math.nan], flags=[pb.LOCAL_NORMS] * 3))
    assert collector.intake.urgent == {"r-0", "r-1"}


def test_a_start_leaves_the_records_of_finalized_steps_for_the_first_commit(collector: Collector) -> None:
    collector.take(block(), block_of([batch(0, 4, [4.0, 5.0])]))
    assert collector.finalized() == [(1, 2), (2, 2), (3, 2)]
    collector.store.close()
    collector.open()
    (run,) = collector.runs
    buffer = run.newest.buffer
    assert [len(buffer.records(sequence)[0]) for sequence in (1, 3, 4, 5)] == [0, 0, 1, 1]
    collector.intake.commit()
    assert [len(buffer.records(sequence)[0]) for sequence in (1, 3, 4, 5)] == [2, 2, 1, 1]


def test_a_nan_right_after_a_start_has_the_records_before_it_as_evidence(collector: Collector) -> None:
    collector.take(block())
    collector.finalized()
    collector.store.close()
    collector.open()
    collector.take(block(4, global_nan_parameters=[0.0, 0.0, 1.0]))
    collector.finalized()
    (run,) = collector.runs
    newest = run.incidents.newest
    assert newest is not None
    window = collector.store.incident_window(run.name, newest.number)
    assert window is not None
    assert sorted(set(window.records["sequence"].tolist())) == [1, 2, 3, 4, 5, 6]


def test_a_restart_reads_as_many_steps_of_a_job_as_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector(tmp_path / "db", world_size=8192)
    for first in range(1, 200, 3):
        collector.take(block(first))
        collector.finalized()
    collector.store.close()
    (run,) = collector.runs
    before, loaded = run.newest.buffer, list[str]()
    assert before.finalized == 201 and before.capacity == 64

    def counted(*given: Any) -> None:
        loaded.append(given[2])
        restore(*given)

    monkeypatch.setattr(store, "restore", counted)
    collector.open()
    assert not loaded
    collector.finalized()
    assert len(loaded) == 22  # of three steps each
    (run,) = collector.runs
    for sequence in range(138, 202):
        wanted, found = before.records(sequence), run.newest.buffer.records(sequence)
        assert found[0].tolist() == wanted[0].tolist() == [0, 1]
        assert found[1].tobytes() == wanted[1].tobytes()
    assert [step.sequence for step in run.newest.steps] == list(range(1, 202))
