"""What the ranks of a node say together to a collector that takes blocks, and when. Time is an argument here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreshock_collector.records.batch import RECORD, decode
from foreshock_collector.records.block import decode_block
from foreshock_protos.columns import RECORD_COLUMNS, WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.node import Node
from foreshock_recorder.ranks import Rank
from foreshock_recorder.ring import Ring
from tests.support.listeners import Listener
from tests.support.rings import LAYERS, begin, make_ring, measure, step

VERSION_2 = (
    *("step", "wall_seconds", "monotonic_seconds", "learning_rate", "flags", "loss", "loss_scale", "global_norm"),
    *("clip_coefficient", "local_norm", "global_nan_parameters", "global_inf_parameters", "local_nan_parameters"),
    *("local_inf_parameters", "first_nonfinite_global", "first_nonfinite_local", "parameter_fingerprint"),
    *("gradient_absolute_maximum", "parameter_norm", "update_ratio", "first_moment_norm", "second_moment_norm"),
)
"""The columns of a record as the first blocks had them."""


class Together:
    """Asks the ranks of some rings for their messages; a collector that has stored nothing yet."""

    def __init__(self, *rings: Ring) -> None:
        self.ranks = {ring.path: Rank(ring.path) for ring in rings}
        self.now = 1000.0
        self.unreadable: list[Path] = []
        self._node = Node(self._ignore)
        self.ask()
        for rank in self.ranks.values():
            rank.acknowledge(pb.Ack.Position(instance=rank.instance))

    def _ignore(self, path: Path, _: Exception) -> None:
        self.unreadable.append(path)

    def ask(self, after: float = 0.0, *, limit: int = 512) -> list[pb.FromRecorder]:
        self.now += after
        for rank in self.ranks.values():
            rank.poll(self.now)
        return self._node.next_messages(self.ranks, self.now, interval=1.0, limit=limit)

    def blocks(self, after: float = 0.0, **options: Any) -> list[tuple[int, int, int]]:
        """First sequence number, steps and ranks of each block."""
        found = (message.block for message in self.ask(after, **options) if message.HasField("block"))
        return [(block.first_sequence, block.steps, len(block.ranks)) for block in found]


@pytest.fixture
def rings(tmp_path: Path) -> list[Ring]:
    return [make_ring(tmp_path, 0), make_ring(tmp_path, 1)]


def steps(ring: Ring, first: int, last: int, **columns: float) -> None:
    for sequence in range(first, last + 1):
        step(ring, sequence, **columns)


def test_new_columns_follow_those_of_the_first_blocks_and_are_optional() -> None:
    """Older collectors and recorders read and write records by position."""
    assert tuple(column.name for column in RECORD_COLUMNS)[: len(VERSION_2)] == VERSION_2
    assert all(column.optional and not column.integer for column in RECORD_COLUMNS[len(VERSION_2) - 6 :])


def test_a_block_holds_what_batches_of_the_same_rings_hold(rings: list[Ring]) -> None:
    for rank, ring in enumerate(rings):
        step(ring, 1, first_nonfinite_local=rank, reduced_sequence=1)
        step(ring, 2, global_norm=math.nan, first_nonfinite_global=math.nan, reduced_sequence=1 + rank)
        step(ring, 3, skipped=1.0, shadow=3.0, loss=None, reduced_sequence=math.nan)
        begin(ring, 4)
        ring.write_weights(5, [10.0 + i for i in range(len(WEIGHT_BLOCKS) * LAYERS)])
        step(ring, 5)
        ring.write_exit(ExitReason.FINISHED)
    (message,) = (message for message in Together(*rings).ask() if message.HasField("block"))
    block = decode_block(message.block, LAYERS)
    for place, ring in enumerate(rings):
        (batch,) = Listener(ring).greet().batches()
        expected, found = decode(batch, LAYERS), block.records(place)
        for name in RECORD.names or ():
            np.testing.assert_array_equal(found.rows[name], expected.rows[name], name)
        if place == 0:
            np.testing.assert_array_equal(found.layer_norms, expected.layer_norms)
            np.testing.assert_array_equal(found.weights.blocks, expected.weights.blocks)
            assert found.weights.sequences.tolist() == [5]
    # Of each step, that of the rank that has the newest.
    assert block.sums["reduced_sequence"].tolist()[:2] == [1, 2]


def test_all_ranks_send_their_records_in_one_block_a_second(rings: list[Ring]) -> None:
    together = Together(*rings)
    assert together.blocks() == [(1, 0, 2)]
    for ring in rings:
        steps(ring, 1, 5)
    assert together.blocks(after=0.5) == []
    assert together.blocks(after=0.5) == [(1, 5, 2)]
    assert together.blocks(after=1.0) == [(6, 0, 2)]


def test_a_record_that_not_all_ranks_have_waits_for_the_next_block_and_no_longer(rings: list[Ring]) -> None:
    together = Together(*rings)
    steps(rings[0], 1, 6)
    steps(rings[1], 1, 4)
    assert together.blocks() == [(1, 4, 2)]
    steps(rings[0], 7, 12)
    steps(rings[1], 5, 11)
    assert together.blocks(after=1.0) == [(5, 7, 2)]
    steps(rings[0], 13, 14)
    # One rank lags: what the other had a second ago goes without it.
    assert together.blocks(after=1.0) == [(12, 0, 1), (12, 1, 1)]
    assert together.blocks(after=1.0) == [(12, 0, 1), (13, 2, 1)]


def test_a_nan_on_one_rank_sends_what_all_of_them_have_at_once(rings: list[Ring]) -> None:
    together = Together(*rings)
    together.blocks()
    steps(rings[0], 1, 3)
    steps(rings[1], 1, 2)
    assert together.blocks(after=0.1) == []
    step(rings[1], 3, local_norm=math.nan)
    step(rings[1], 4)
    assert together.blocks(after=0.1) == [(1, 3, 2), (4, 1, 1)]


def test_ranks_of_different_runs_share_no_block(tmp_path: Path) -> None:
    rings = [make_ring(tmp_path, 0), make_ring(tmp_path, 1, run="another")]
    for ring in rings:
        steps(ring, 1, 2)
        measure(ring, 2)
    assert Together(*rings).blocks() == [(1, 2, 1), (1, 2, 1)]


def test_many_records_become_several_blocks_of_a_few_mebibytes_at_most(tmp_path: Path) -> None:
    rings = [make_ring(tmp_path, rank, world_size=16) for rank in range(16)]
    for ring in rings:
        steps(ring, 1, 500)
    sizes = [message.ByteSize() for message in Together(*rings).ask() if message.HasField("block")]
    assert len(sizes) > 1 and max(sizes) < 1.1 * 2**20


def test_a_ring_that_cannot_be_read_costs_the_other_ranks_nothing(rings: list[Ring]) -> None:
    together = Together(*rings)
    steps(rings[1], 1, 2)
    with rings[0].path.open("r+b") as file:
        file.truncate(4096)
    assert together._node.next_messages(together.ranks, 2000.0, interval=1.0, limit=512)
    assert together.unreadable == [rings[0].path]


def test_a_rank_that_has_left_sends_its_exit_behind_its_last_records(rings: list[Ring]) -> None:
    together = Together(*rings)
    together.blocks()
    steps(rings[0], 1, 2)
    rings[0].write_exit(ExitReason.FINISHED)
    kinds = [message.WhichOneof("message") for message in together.ask(after=0.1)]
    assert kinds == ["block", "block", "exit"]
    assert together.blocks(after=0.1) == []
