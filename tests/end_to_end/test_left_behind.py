"""What a job leaves behind: its records where the collector was away, and how a rank died that could not say so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import STANDALONE, Job, recorders, said
from tests.support.waiting import eventually


def ranks_of(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_a_job_that_ended_without_its_collector_is_handed_in_by_the_next_jobs_recorder_or_by_the_command(
    collector: Collector, job: Job, tmp_path: Path
) -> None:
    assert collector.stop() == 0
    for name in ("first", "second"):
        assert "rank 0 done" in said(job(name, collector.address, steps=30))
    for pid in recorders(tmp_path):
        # As if its half minute were over.
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not recorders(tmp_path), "recorders that leave")
    collector.start()
    command = "import sys; from foreshock._cli import main; sys.exit(main())"
    one = tmp_path / "rings" / "first"
    done = subprocess.run(
        [sys.executable, "-c", command, "recorder", "--dir", one], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"run first: 60 records delivered, {collector.url}/run/first\n")
    assert left(collector, "first")["counters"]["steps"] == 30
    assert "second" not in collector.names()
    assert "rank 0 done" in said(job("third", collector.address, steps=5))
    run = left(collector, "second")
    assert run["counters"]["steps"] == 30 and run["counters"]["dropped"] == dict.fromkeys(run["counters"]["dropped"], 0)
    eventually(lambda: not list((tmp_path / "rings").rglob("*.ring")), "empty folders")


def test_a_rank_that_torchrun_finds_killed_is_lost_by_name_of_the_signal(collector: Collector, job: Job) -> None:
    process = job("shot", collector.address, torchrun=STANDALONE, steps=10**6, pace=0.01)
    eventually(lambda: "shot" in collector.names() and collector.run("shot")["counters"]["steps"] > 20, "some steps")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    said(process)
    run = left(collector, "shot")
    assert run["ranks"][1]["state"] == "lost"
    # torchrun may have fetched its exit status first.
    assert run["ranks"][1]["detail"] in ("killed by SIGKILL", "")
