"""Rings that are damaged while a rank writes them: the training lives, and the node's other ranks are delivered."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.delivery import Delivery, pause_seconds
from foreshock_recorder.folder import lock
from foreshock_recorder.layout import JSON_OFFSET, WORD_EXIT_REASON, ExitReason
from foreshock_recorder.ranks import Rank
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring
from tests.support.fake_collector import FakeCollector
from tests.support.rings import FIRST, SECOND, make_ring, step
from tests.support.waiting import WAIT_SECONDS


def deliver(folder: Path, collector: FakeCollector, *, until: Callable[[], bool]) -> None:
    """Serve a folder until something holds."""

    async def run() -> None:
        held = lock(folder)
        assert held is not None
        delivery = Delivery(folder, held, collector=collector.address, linger=WAIT_SECONDS, empty=WAIT_SECONDS)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not until():
                    delivery.poll(time.monotonic())
                    await asyncio.sleep(0.01)
        finally:
            await delivery.close()

    asyncio.run(run())


def spoil_exit(ring: Ring) -> None:
    """Write an exit reason that no version knows."""
    ring.memory[8 * WORD_EXIT_REASON] = 200


def cut(ring: Ring) -> None:
    os.truncate(ring.path, 100)


@pytest.mark.parametrize("damage", [spoil_exit, cut])
def test_a_damaged_ring_does_not_stop_the_delivery_of_another(
    folder: Path, collector: FakeCollector, damage: Callable[[Ring], None]
) -> None:
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    for ring in rings:
        step(ring, 1)
    deliver(folder, collector, until=lambda: collector.position[FIRST] == collector.position[SECOND] == 1)
    damage(rings[0])
    step(rings[1], 2)
    rings[1].write_exit(ExitReason.FINISHED)
    deliver(folder, collector, until=lambda: not rings[1].path.exists())
    assert collector.told[SECOND].sequences() == [1, 2]
    assert rings[0].path.exists()


def test_a_ring_that_is_cut_under_a_recorder_is_left_alone_and_read_again_once_it_is_whole(
    folder: Path, collector: FakeCollector
) -> None:
    rings = [make_ring(folder, 0), make_ring(folder, 1)]

    def cut_restored_and_delivered() -> bool:
        if not rings[1].begun:
            cut(rings[0])
            step(rings[1], 1)
        if collector.position[SECOND] == 1 and not collector.position[FIRST]:
            # The rank writes on, and restores the file by that.
            step(rings[0], 1)
        return collector.position[FIRST] == 1

    deliver(folder, collector, until=cut_restored_and_delivered)
    assert collector.told[FIRST].sequences() == [1]


def test_a_rank_whose_ring_is_cut_restores_it_and_goes_on_counting(folder: Path) -> None:
    ring = make_ring(folder)
    for sequence in (1, 2, 3):
        step(ring, sequence)
    for size in (0, 100, ring.layout.header_bytes):
        os.truncate(ring.path, size)
        # A step begins with its backward pass, and before a SIGBUS there is no error.
        ring.count_backward_pass()
        assert ring.begun == 3
        os.truncate(ring.path, size)
        step(ring, 4)
        reader = RingReader(ring.path)
        assert (reader.begun, reader.identity["instance"]) == (4, FIRST)
        assert reader.read(4).step == 104  # type: ignore[union-attr]
        reader.close()
        ring.begin_step(3, step=103, wall=1.7e9, monotonic=0.0, learning_rate=0.5)


def overwrite_header(ring: Ring) -> None:
    ring.memory[:JSON_OFFSET] = b"\xff" * JSON_OFFSET


def test_a_ring_whose_header_is_overwritten_is_left_alone_until_its_rank_restores_it(
    folder: Path, collector: FakeCollector, caplog: pytest.LogCaptureFixture
) -> None:
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    step(rings[0], 1)
    stage = 0

    def overwritten_restored_and_delivered() -> bool:
        nonlocal stage
        if stage == 0 and collector.position[FIRST] == 1:
            overwrite_header(rings[0])
            step(rings[1], 1)
            stage = 1
        elif stage == 1 and collector.position[SECOND] == 1 and caplog.records:
            step(rings[0], 2)
            stage = 2
        return collector.position[FIRST] == 2

    deliver(folder, collector, until=overwritten_restored_and_delivered)
    assert collector.told[FIRST].sequences() == [1, 2]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == f"ignored: {rings[0].path} is damaged: its header was overwritten"


def test_a_header_that_is_overwritten_while_a_ring_is_read_is_not_sent(folder: Path) -> None:
    ring = make_ring(folder)
    step(ring, 1)
    rank = Rank(ring.path)
    rank.next_messages(0.0, interval=1.0, limit=8)
    rank.acknowledge(pb.Ack.Position(instance=FIRST))
    rank.read_ahead(0.0, limit=8)
    overwrite_header(ring)
    with pytest.raises(ValueError, match="its header was overwritten"):
        rank.take(0.0, limit=8)
    rank.close()


def test_a_rank_whose_header_is_overwritten_restores_it_and_goes_on_counting(folder: Path) -> None:
    ring = make_ring(folder)
    step(ring, 1)
    overwrite_header(ring)
    ring.count_backward_pass()
    overwrite_header(ring)
    ring.count_dropped("probe_error")
    reader = RingReader(ring.path)
    assert (reader.begun, reader.dropped, reader.identity["instance"]) == (1, {"probe_error": 1}, FIRST)
    assert reader.backward_passes == 1
    overwrite_header(ring)
    step(ring, 2)
    assert [reader.read(sequence).step for sequence in (1, 2)] == [101, 102]  # type: ignore[union-attr]
    assert (reader.backward_passes, reader.dropped) == (1, {"probe_error": 1})
    reader.close()


def test_an_unknown_exit_reason_of_a_dead_rank_is_replaced(folder: Path) -> None:
    ring = make_ring(folder)
    spoil_exit(ring)
    reader = RingReader(ring.path)
    assert reader.exit_reason.name == "NONE"
    reader.write_exit(ExitReason.LOST)
    assert reader.exit_reason.name == "LOST"


def test_a_fast_run_is_tried_again_before_half_of_its_ring_is_overwritten(folder: Path) -> None:
    ring = make_ring(folder, slots=64)
    rank = Rank(ring.path)
    assert rank.fill_seconds() == math.inf
    for sequence in range(1, 101):
        ring.begin_step(sequence, step=sequence, wall=0.0, monotonic=sequence / 250, learning_rate=0.1)
    assert rank.fill_seconds() == pytest.approx(64 / 250)
    pauses = [pause_seconds(10, share, refused=False, fill_seconds=4096 / 250) for share in (0.0, 0.5, 1.0)]
    assert pauses == pytest.approx([0.0, 4.096, 8.192])
    rank.close()
