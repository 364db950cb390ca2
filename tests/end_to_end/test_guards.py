"""Scripts that guard themselves against a loss that is not finite: what the collector says of them in the end."""

from __future__ import annotations

from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import Job

GUARDS = ["exit", "raise", "error_if_nonfinite", "anomaly"]


def test_a_run_that_ends_by_its_own_guard_has_its_incident_at_that_step(collector: Collector, job: Job) -> None:
    for guard in GUARDS:
        job(guard, collector.address, steps=60, nan_at=30, nan_rank=1, guard=guard).communicate(timeout=100)
        told = left(collector, guard)
        verdict = told["incidents"][-1]["verdict"]
        assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("sudden_nonfinite", 1, 30), guard
        assert told["counters"]["steps"] == 30 and told["counters"]["abandoned"] == 1, guard
        assert "exception" in {rank["state"] for rank in told["ranks"]}, guard


def test_an_explosion_that_a_guard_ends_is_told_with_its_lead(collector: Collector, job: Job) -> None:
    job("lost", collector.address, steps=200, explode_at=40, guard="exit").communicate(timeout=100)
    verdict = left(collector, "lost")["incidents"][-1]["verdict"]
    assert verdict["cause"] == "exploding_gradients" and verdict["lead_steps"] > 3


def test_a_batch_that_a_script_leaves_out_is_counted_and_nobody_is_called(collector: Collector, job: Job) -> None:
    job("skips", collector.address, steps=60, nan_at=30, nan_rank=1, guard="skip").communicate(timeout=100)
    told = left(collector, "skips")
    assert told["incidents"] == []
    assert (told["counters"]["steps"], told["counters"]["abandoned"]) == (59, 1)
