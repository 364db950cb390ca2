"""A peer that begins too many runs gets half of them, and costs the run of another nothing."""

from __future__ import annotations

import pytest

from benchmarks.flood import flood


@pytest.mark.integration
def test_a_flood_of_runs_leaves_no_hole_in_the_steps_of_another() -> None:
    found = flood(120, "--most-runs=20", "--ack-seconds=0.1")
    # The honest rank has the same address, and one of its ten.
    assert found.runs_accepted == 9
    assert found.honest_stored == found.honest_sent > 0
