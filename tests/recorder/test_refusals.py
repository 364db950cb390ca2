"""A rank that its collector does not take in: it alone, in words, until the collector thinks otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_recorder.layout import ExitReason
from tests.support.fake_collector import FakeCollector
from tests.support.rank_process import Start
from tests.support.rings import make_ring, step
from tests.support.waiting import WAIT_SECONDS, until

pytestmark = pytest.mark.integration

FIRST, SECOND = "first-0-abcd", "first-1-abcd"
WHY = "world_size 3: this launch has reported 2 ranks before"


def test_one_refused_rank_stops_no_other_and_is_offered_again_on_the_same_stream(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.refused[FIRST] = WHY
    rings = [make_ring(folder, 0), make_ring(folder, 1)]
    for ring in rings:
        for sequence in range(1, 6):
            step(ring, sequence)
    running = recorder()
    until(lambda: rings[0].problem == f"{collector.address}: refused: {WHY}" and rings[1].acknowledged == 5)
    assert rings[1].problem == "" and rings[1].page == "http://monitor:9327/run/crimson-otter"
    assert not collector.told[FIRST].batches and rings[0].page == ""
    step(rings[1], 6)
    collector.wait_for(lambda: collector.position[SECOND] == 6)
    collector.wait_for(lambda: len(collector.told[FIRST].hellos) >= 2)
    assert collector.streams == 1 and not collector.told[FIRST].batches
    collector.refused.clear()
    collector.wait_for(lambda: collector.position[FIRST] == 5)
    assert collector.streams == 1
    until(lambda: rings[0].problem == "")
    for ring in rings:
        ring.write_exit(ExitReason.FINISHED)
    assert running.wait(WAIT_SECONDS) == 0


def test_the_ring_of_a_refused_rank_that_has_gone_is_kept(
    folder: Path, collector: FakeCollector, recorder: Start
) -> None:
    collector.refused[FIRST] = WHY
    ring = make_ring(folder)
    step(ring, 1)
    ring.write_exit(ExitReason.FINISHED)
    assert recorder(linger=0.5).wait(WAIT_SECONDS) == 0
    assert ring.path.exists() and WHY in (folder / "recorder.log").read_text()
