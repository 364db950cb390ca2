"""A training that resumes from a checkpoint is protected from its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import Job, said
from tests.support.waiting import WAIT_SECONDS

_LINE = "continuing the history of norms that the collector has of this run"


def test_a_resumed_training_begins_with_the_norms_of_its_last_attempt(
    collector: Collector, job: Job, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"optimizer": "Adam", "attach": {"skip": True, "dry_run": True}}
    options["history_seconds"] = WAIT_SECONDS
    options["checkpoint"] = str(tmp_path / "optimizer")
    assert _LINE not in said(job("night", collector.address, steps=60, **options))
    assert left(collector, "night")["attempt"] == 0
    assert _LINE in said(job("night", collector.address, steps=20, start=60, **options))
    assert left(collector, "night")["attempt"] == 1
