"""Every script in examples/ runs as its docstring says, and the collector sees what it shows."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

from tests.support.collector_process import Collector, left
from tests.support.forked_jobs import forking
from tests.support.waiting import WAIT_SECONDS

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(collector: Collector, folder: Path, run: str, script: str, *arguments: str) -> dict[str, Any]:
    """Train on two ranks until the script ends; the run as the API shows it then."""
    environment = {
        "FORESHOCK_COLLECTOR": collector.address,
        "FORESHOCK_RUN": run,
        "FORESHOCK_RING_DIR": str(folder / "rings"),
        "FORESHOCK_STRICT": "1",
        "OMP_NUM_THREADS": "1",
    }
    text = folder / f"{uuid.uuid4()}.txt"
    job = forking().start(EXAMPLES / script, *arguments, ranks=2, output=(text, text), environment=environment)
    try:
        out, _ = job.communicate(WAIT_SECONDS)
    finally:
        job.kill()
    assert job.wait() == 0, out
    return left(collector, run)


def test_mixed_precision_makes_one_record_per_optimizer_step_and_is_clipped(
    collector: Collector, tmp_path: Path
) -> None:
    found = run_example(collector, tmp_path, "amp", "mixed_precision.py", "--steps", "30")
    assert found["counters"]["steps"] == 30
    assert found["counters"]["clipped"] > 0
    assert found["condition"] == "ended"


def test_a_sharded_model_is_a_run_like_any_other_and_is_clipped(collector: Collector, tmp_path: Path) -> None:
    found = run_example(collector, tmp_path, "sharded", "fully_shard.py", "--steps", "30")
    assert found["counters"]["steps"] == 30 and found["counters"]["clipped"] > 0
    assert found["condition"] == "ended" and found["incidents"] == []


def test_a_resumed_job_is_the_next_attempt_of_its_run_and_its_steps_continue(
    collector: Collector, tmp_path: Path
) -> None:
    checkpoint = str(tmp_path / "resumed.pt")
    first = run_example(collector, tmp_path, "resumed", "resume.py", "--checkpoint", checkpoint, "--steps", "50")
    assert first["newest"]["step"] == 49
    found = run_example(collector, tmp_path, "resumed", "resume.py", "--checkpoint", checkpoint, "--steps", "70")
    assert found["newest"]["step"] == 69
    assert [attempt["steps"] for attempt in found["attempts"]] == [50, 20]
    assert found["counters"]["steps"] == 70
    assert found["incidents"] == []


def test_the_examples_are_those_that_their_readme_lists() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
