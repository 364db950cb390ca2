"""How a job may end, and who is paged for it: real ranks, real Prometheus and Alertmanager."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.alerted_collector import Watch
from tests.support.collector_process import left
from tests.support.launched_jobs import STANDALONE, Job, recorders, said
from tests.support.waiting import eventually

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"


def paged(watch: Watch, run: str, steps: int) -> list[str]:
    """Names of the alerts that somebody was told of, once Prometheus has judged the run's end."""
    eventually(lambda: watch.scraped(run, steps), "a scrape after the end")
    eventually(lambda: watch.scraped(run, steps), "another one")
    return [alert["labels"]["alertname"] for alert in watch.told(run)]


def the_page(watch: Watch, run: str, steps: int) -> str:
    """What the one page about it says."""
    eventually(lambda: watch.told(run), "a page")
    assert paged(watch, run, steps) == ["ForeshockRunDied"]
    assert watch.collector.run(run)["condition"] == "failed"
    return str(watch.told(run)[0]["annotations"]["description"])


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in map(int, children) for each in descendants(child))]


@pytest.mark.parametrize(
    ("run", "launcher", "options", "named", "steps"),
    [
        ("killed", STANDALONE, {"kill_at": 30, "who": [1]}, ("rank 1", "SIGKILL"), 31),
        ("one-raises", (), {"raise_at": 20, "who": [1], "error": "bad"}, ("rank 1", "RuntimeError: bad"), 21),
        # Nobody is left for a launcher to end.
        ("all-raise", (), {"raise_at": 20, "error": OUT_OF_MEMORY}, (f"RuntimeError: {OUT_OF_MEMORY}",), 21),
        ("exits", (), {"exit_at": 20, "exit_code": 3}, ("exit code 3",), 21),
    ],
)
def test_a_job_that_dies_pages_once_and_names_whom(
    watch: Watch,
    job: Job,
    run: str,
    launcher: tuple[str, ...],
    options: dict[str, Any],
    named: tuple[str, ...],
    steps: int,
) -> None:
    said(job(run, watch.collector.address, torchrun=launcher, steps=60, pace=0.02, **options))
    description = the_page(watch, run, steps)
    assert all(name.lower() in description.lower() for name in named), description
    (incident,) = watch.collector.run(run)["incidents"]
    assert incident["verdict"]["cause"] == "crashed"


def test_a_job_whose_processes_are_all_killed_at_once_pages_once(watch: Watch, job: Job, tmp_path: Path) -> None:
    process = job("tree", watch.collector.address, torchrun=STANDALONE, steps=10**6, pace=0.02)
    running(watch, "tree")
    for pid in set(descendants(process.pid)) - set(recorders(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    said(process)
    the_page(watch, "tree", 10)


@pytest.mark.parametrize(("run", "options"), [("exit-0", {"exit_at": 20, "exit_code": 0}), ("through", {"steps": 40})])
def test_a_job_that_ends_well_pages_nobody(watch: Watch, job: Job, run: str, options: dict[str, Any]) -> None:
    said(job(run, watch.collector.address, **{"steps": 60, "pace": 0.02, **options}))
    left(watch.collector, run)
    assert paged(watch, run, 21) == []
    assert watch.collector.run(run)["condition"] == "ended"


@pytest.mark.parametrize(("run", "number"), [("ctrl-c", signal.SIGINT), ("requeued", signal.SIGTERM)])
def test_a_job_that_its_user_or_scheduler_stops_pages_nobody(
    watch: Watch, job: Job, run: str, number: signal.Signals
) -> None:
    process = job(run, watch.collector.address, torchrun=STANDALONE, steps=10**6, pace=0.02)
    running(watch, run)
    process.send_signal(number)
    said(process)
    left(watch.collector, run)
    assert paged(watch, run, 10) == []
    assert watch.collector.run(run)["condition"] == "interrupted"


def test_a_restart_that_goes_on_resolves_the_page(watch: Watch, job: Job) -> None:
    said(job("again", watch.collector.address, steps=60, raise_at=20))
    the_page(watch, "again", 21)
    process = job("again", watch.collector.address, steps=10**6, pace=0.1)
    running(watch, "again", attempt=1)
    # The alert goes on for a minute, so that it does not come and go.
    eventually(lambda: "ForeshockRunDied" not in watch.alerts("again"), "its end", after=60.0)
    process.send_signal(signal.SIGINT)
    said(process)


def running(watch: Watch, run: str, attempt: int = 0) -> None:
    """Until it has made some steps."""
    eventually(lambda: run in watch.collector.names(), "the run")

    def some() -> bool:
        seen = watch.collector.run(run)
        return bool(seen["attempt"] == attempt and (seen["newest"].get("step") or 0) > 20)

    eventually(some, "some steps")
