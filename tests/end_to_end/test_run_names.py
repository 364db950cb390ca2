"""Two trainings of one name at once are two runs, and each hears which."""

from __future__ import annotations

from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import Job, said
from tests.support.waiting import eventually


def test_two_trainings_of_one_name_at_once_are_two_runs_and_a_restart_is_an_attempt(
    collector: Collector, job: Job
) -> None:
    first = job("night", collector.address, ranks=1, steps=10**6, pace=0.01)
    eventually(lambda: collector.names() == ["night"], "the first")
    second = job("night", collector.address, ranks=2, steps=120, pace=0.01, nan_at=100, nan_rank=1)
    text = said(second)
    assert f"run night-2: {collector.url}/run/night-2; the name night is in use by another run" in text
    run = left(collector, "night-2")
    assert run["counters"]["steps"] == 120 and run["incidents"]
    night = collector.run("night")
    assert night["condition"] == "running" and night["incidents"] == [] and night["attempt"] == 0
    first.terminate()
    first.wait(timeout=60)
    third = job("night", collector.address, ranks=1, steps=20)
    assert f"run night: {collector.url}/run/night" in said(third)
    assert collector.run("night")["attempt"] == 1
    assert sorted(collector.names()) == ["night", "night-2"]


def test_two_models_that_one_script_trains_in_turn_are_two_runs_and_the_nan_of_one_is_not_the_others(
    collector: Collector, job: Job
) -> None:
    text = said(job("gan", collector.address, steps=60, critic=3, nan_at=40, nan_rank=1))
    assert "run gan-2: " in text
    runs = {name: left(collector, name) for name in ("gan", "gan-2")}
    assert {name: (run["attempt"], run["counters"]["steps"]) for name, run in runs.items()} == {
        "gan": (0, 60), "gan-2": (0, 180),
    }  # fmt: skip
    assert sorted(len(run["incidents"]) for run in runs.values()) == [0, 1]
