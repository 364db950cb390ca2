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

from tests.support.alerted_collector import Watch
from tests.support.collector_process import Collector, left
from tests.support.commands import FORESHOCK
from tests.support.forked_jobs import forking
from tests.support.repository import ROOT
from tests.support.scraped_run import BUILD_UP, Scraped
from tests.support.waiting import WAIT_SECONDS, eventually

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        not all(map(find_spec, ("accelerate", "lightning", "transformers"))),
        reason="the trainers are not installed: make test-trainers",
    ),
]

EXAMPLES = ROOT / "examples"
TRAINER = ROOT / "tests/end_to_end/train_with_trainer.py"


def recurrent(**callback: float) -> list[str]:
    """Arguments of a job that explodes although its trainer clips to a norm of 1, and of its callback."""
    trainer = {"max_grad_norm": 1.0, "max_steps": 130}
    return [json.dumps({"explodes": True, "trainer": trainer, "callback": callback})]


JOBS: dict[str, tuple[Path, list[str], list[str]]] = {
    name: (EXAMPLES / script, ["--lr", "0.3", *options], ["--lr", "0.3", *options, "--clip", "1.0"])
    for name, script, options in (
        ("transformers", "transformers_trainer.py", ["--max-grad-norm", "0"]),
        ("lightning", "lightning_trainer.py", []),
        ("accelerate", "accelerate_loop.py", []),
    )
} | {"transformers-clips": (TRAINER, recurrent(), recurrent(clip=0.0005))}
"""Script, its arguments with which the gradients explode, and those with which Foreshock clips them."""

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


def pages(watch: Watch, run: str) -> list[dict[str, Any]]:
    """What a person has been told of the explosion."""
    return [alert for alert in watch.told(run) if alert["labels"]["alertname"] == "ForeshockExplodingGradients"]


@pytest.mark.parametrize("trainer", JOBS)
def test_a_trainer_that_explodes_is_told_of_and_has_its_verdict_and_survives_if_foreshock_clips(
    watch: Watch, tmp_path: Path, trainer: str
) -> None:
    collector, exploding, surviving = watch.collector, f"{trainer}-explodes", f"{trainer}-survives"
    script, explodes, survives = JOBS[trainer]
    with Scraped(collector, exploding) as scraped:
        run_job(collector, tmp_path, exploding, script, *explodes)
        told = left(collector, exploding)
        scraped.wait_for(BUILD_UP, "exploding_gradients")
    (incident,) = told["incidents"]
    verdict = incident["verdict"]
    assert verdict["cause"] == "exploding_gradients" and verdict["lead_steps"] > 0
    assert told["condition"] == "failed"
    assert "Gradients exploded" in report(collector, tmp_path, exploding)
    build_up = next(event["step"] for event in told["events"] if event["kind"] == "build_up")
    assert build_up < verdict["first_bad_step"]
    sys.stdout.write(
        f"{trainer}: on /metrics {scraped.seconds_after(BUILD_UP, build_up):.2f} s after the build-up,"
        f" {scraped.seconds_after(verdict['cause'], verdict['first_bad_step']):.2f} s after the NaN;"
    )
    page = eventually(lambda: pages(watch, exploding), "the page")[0]
    seconds = page["heard_seconds"] - scraped.made(verdict["first_bad_step"])
    sys.stdout.write(f" the page by Alertmanager {seconds:.2f} s after it\n")

    run_job(collector, tmp_path, surviving, script, *survives)
    after = left(collector, surviving)
    assert after["condition"] == "ended" and after["incidents"] == []
    assert after["counters"]["steps"] == told["counters"]["steps"] and after["counters"]["clipped"] > 100


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
