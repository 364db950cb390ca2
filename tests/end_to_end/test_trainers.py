"""Jobs of real trainers on two ranks that explode: what an alert reads, the verdict, the report; and what averts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.support.collector_process import Collector, left
from tests.support.commands import FORESHOCK
from tests.support.forked_jobs import forking
from tests.support.repository import ROOT
from tests.support.scraped_run import BUILD_UP, Scraped
from tests.support.waiting import WAIT_SECONDS

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        not all(map(find_spec, ("accelerate", "lightning", "transformers"))),
        reason="the trainers are not installed: make test-trainers",
    ),
]

EXAMPLES = {
    "transformers": ["transformers_trainer.py", "--max-grad-norm", "0"],
    "lightning": ["lightning_trainer.py"],
    "accelerate": ["accelerate_loop.py"],
}
TRAINER = ROOT / "tests/end_to_end/train_with_trainer.py"
CONTINUES = "continuing the history of norms that the collector has of this run"


def installed(package: str) -> Version:
    """The version that is installed; 0 for none."""
    return Version(version(package) if find_spec(package) else "0")


def run_job(collector: Collector, folder: Path, run: str, script: Path, *arguments: str) -> str:
    """Train on two ranks; what they have written."""
    environment = {
        "FORESHOCK_COLLECTOR": collector.address,
        "FORESHOCK_RUN": run,
        "FORESHOCK_RING_DIR": str(folder / "rings"),
        "FORESHOCK_STRICT": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    text = folder / f"{uuid.uuid4()}.txt"
    job = forking().start(script, *arguments, ranks=2, output=(text, text), environment=environment)
    try:
        out, _ = job.communicate(WAIT_SECONDS)
    finally:
        job.kill()
    assert job.wait() == 0, out
    return out


def report(collector: Collector, folder: Path, run: str) -> str:
    """The text of `foreshock report`."""
    path = folder / "report.html"
    environment = {**os.environ, "FORESHOCK_URL": collector.url}
    subprocess.run([*FORESHOCK, "report", run, "-o", str(path)], check=True, env=environment, capture_output=True)
    return path.read_text()


@pytest.mark.parametrize("trainer", EXAMPLES)
def test_a_trainer_that_explodes_is_warned_of_and_has_its_verdict_and_survives_if_foreshock_clips(
    collector: Collector, tmp_path: Path, trainer: str
) -> None:
    script, *options = EXAMPLES[trainer]
    path, explosive = ROOT / "examples" / script, [*options, "--lr", "0.3"]
    with Scraped(collector, "explodes") as scraped:
        run_job(collector, tmp_path, "explodes", path, *explosive)
        told = left(collector, "explodes")
        scraped.wait_for(BUILD_UP, "exploding_gradients")
    (incident,) = told["incidents"]
    verdict = incident["verdict"]
    assert verdict["cause"] == "exploding_gradients" and verdict["lead_steps"] > 0
    assert told["condition"] == "failed" and told["counters"]["steps"] == 300
    assert "Gradients exploded" in report(collector, tmp_path, "explodes")
    build_up = next(event["step"] for event in told["events"] if event["kind"] == "build_up")
    assert build_up < verdict["first_bad_step"]
    seconds = (
        scraped.seconds_after(BUILD_UP, build_up),
        scraped.seconds_after(verdict["cause"], verdict["first_bad_step"]),
    )
    sys.stdout.write(
        f"{trainer}: on /metrics {seconds[0]:.2f} s after the build-up, {seconds[1]:.2f} s after the NaN\n"
    )

    run_job(collector, tmp_path, "survives", path, *explosive, "--clip", "1.0")
    told = left(collector, "survives")
    assert told["condition"] == "ended" and told["incidents"] == []
    assert told["counters"]["steps"] == 300 and told["counters"]["clipped"] > 100


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_nan_on_one_rank_of_a_trainer_has_its_verdict_and_is_skipped_if_foreshock_takes_over(
    collector: Collector, tmp_path: Path, max_grad_norm: float
) -> None:
    def nan_job(run: str, callback: dict[str, Any]) -> str:
        trainer = {"max_grad_norm": max_grad_norm, "max_steps": 60}
        options = {"callback": callback, "trainer": trainer, "nan_at": 40}
        return run_job(collector, tmp_path, run, TRAINER, json.dumps(options))

    with Scraped(collector, "lost") as scraped:
        assert nan_job("lost", {}).count("weights are lost") == 2
        (incident,) = left(collector, "lost")["incidents"]
        scraped.wait_for("sudden_nonfinite")
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("sudden_nonfinite", 1, 40)
    seconds = scraped.seconds_after("sudden_nonfinite", 40)
    sys.stdout.write(f"max_grad_norm={max_grad_norm:g}: on /metrics {seconds:.2f} s after the NaN\n")

    assert nan_job("survives", {"clip": 1.0, "skip": True}).count("weights are finite") == 2
    told = left(collector, "survives")
    assert told["condition"] == "ended" and told["incidents"] == []
    assert (told["counters"]["steps"], told["counters"]["skipped"]) == (60, 1)


@pytest.mark.skipif(
    installed("transformers") < Version("5.18"),
    reason="transformers before 5.18 cannot resume on several CPUs: it loads the optimizer to cpu:0, as torch cannot",
)
def test_a_trainer_that_resumes_begins_with_the_norms_of_its_last_attempt(collector: Collector, tmp_path: Path) -> None:
    def job(steps: int, *, resumes: bool) -> str:
        saving = {"output_dir": str(tmp_path / "saved"), "save_strategy": "steps", "save_steps": 60}
        options = {"callback": {"skip": True}, "trainer": {"max_steps": steps, **saving}, "resumes": resumes}
        return run_job(collector, tmp_path, "night", TRAINER, json.dumps({**options, "history_seconds": WAIT_SECONDS}))

    assert CONTINUES not in job(60, resumes=False)
    assert left(collector, "night")["attempt"] == 0
    assert CONTINUES in job(80, resumes=True)
    told = left(collector, "night")
    assert [attempt["steps"] for attempt in told["attempts"]] == [60, 20] and told["newest"]["step"] == 79
