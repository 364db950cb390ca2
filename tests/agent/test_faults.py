"""An internal error of the probe costs a record: never the run, its weights, or a collective."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.collector_process import Collector
from tests.support.commands import FORESHOCK
from tests.support.torch_jobs import Job, Scenario, run_scenarios

pytestmark = pytest.mark.integration

SCRIPT = "faults.py"
SITES = [
    "local_norms", "local_summary", "contribution", "end_of_backward", "edits", "begin", "norms", "measure", "apply",
    "decide", "collect", "row", "observe", "check",
]  # fmt: skip
KERNELS = [] if find_spec("triton") is None else ["everywhere_kernels"]
EVERYWHERE = ["everywhere_fused", "everywhere_unfused", "everywhere_adaptive", *KERNELS]
CASES = [f"{site}_{kind}" for site, kind in product(SITES, ("fused", "unfused"))]
STEPS = [0, 1, 2, 3, 4, 5]
FAILING = 3
STAGES = {
    "LocalNorms.measure", "RankSums.prepare", "Observations.stepped", "GradientEdits.compare", "Record.begin",
    "OptimizerControl.read", "Measure.measure", "Decide.decide", "Apply.apply", "Record.write", "RankSums.collect",
    "OptimizerControl.restore",
}  # fmt: skip
KERNEL_STAGES = {
    "KernelLocalNorms.measure", "KernelRankSums._fill", "KernelMeasure.measure", "KernelDecide.decide",
    "KernelApply.apply", "PinnedRing.write_words", "RankSums.arrived",
}  # fmt: skip
WITHOUT_ROW = {"norms", "measure", "apply", "decide", "collect", "row"}
"""Where the record of that step stays without its measured part; elsewhere it is whole."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the job's rings stay: no recorder delivers them."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Scenario]:
    return run_scenarios(folder, SCRIPT, [*CASES, *EVERYWHERE, "everywhere_logged"], FORESHOCK_STRICT="")


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    started = Collector(tmp_path)
    yield started
    assert started.stop() == 0


def dropped(collector: Collector) -> dict[str, float]:
    """By run, as Prometheus would hear of it: records that an error of the probe has cost."""
    with urllib.request.urlopen(f"{collector.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["foreshock_records_dropped"].samples
    return {s.labels["run"]: s.value for s in samples if s.labels["reason"] == "probe_error"}


@pytest.mark.parametrize("case", CASES)
def test_an_error_inside_the_probe_on_one_rank_costs_a_record_and_nothing_else(
    found: dict[str, Scenario], case: str
) -> None:
    site = case.rpartition("_")[0]
    good, bad = found[case].results
    assert bad["fired"] and not good["fired"]
    # Clipped as stock on all ranks, at the step of the error too; one rank may have had to clip by other means.
    for result in (good, bad):
        assert result["apart"] < 1e-4 and result["alike"] < 1e-5
    assert good["dropped"] == {} and bad["dropped"] == {"probe_error": 1}
    assert bad["note"] == "KeyError: 'a bug of ours'"
    assert good["steps"] == good["measured"] == STEPS
    # Its steps keep their numbers.
    without = [step for step in STEPS if step != FAILING]
    assert bad["steps"] == (without if site == "begin" else STEPS)
    assert bad["measured"] == (without if site in WITHOUT_ROW | {"begin"} else STEPS)
    if site in {"local_norms", "local_summary"}:
        assert bad["local"][str(FAILING)] == 0.0, "a norm without one bucket would be a wrong norm"
    others = [norm for step, norm in bad["local"].items() if step != str(FAILING)]
    assert all(norm > 0 for norm in others)
    ((line,), nothing) = ([line for line in lines if "internal error" in line] for lines in reversed(found[case].said))
    assert "dropped a step record; training continues" in line and nothing == []


@pytest.mark.parametrize("case", EVERYWHERE)
def test_each_call_that_a_step_makes_inside_the_probe_may_fail_on_one_rank(
    found: dict[str, Scenario], case: str
) -> None:
    good, bad = found[case].results
    # After each, ours was where stock clipping is, as were both ranks, and one record was counted as dropped.
    assert good["wrong"] == bad["wrong"] == []
    # Some 70 calls a step (test_step_trace.py), a few of which are entries of guards or C++.
    assert bad["never"] == [] and sum(bad["runs"].values()) > 60
    assert set(bad["called"]) >= (KERNEL_STAGES if case in KERNELS else STAGES)
    for mine, theirs in zip(*bad["learned"], strict=True) if bad["learned"][0] else []:
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_a_script_that_logs_norms_is_clipped_alike_whatever_fails_on_one_rank(found: dict[str, Scenario]) -> None:
    good, bad = found["everywhere_logged"].results
    assert good["wrong"] == [] and bad["wrong"] == [] and bad["never"] == []
    called = {"Measure.averaged", "Measure.confirms_edit", "HostArithmetic.norms", "GradientEdits.changed"}
    assert set(bad["called"]) >= called | {"OptimizerControl.read"}


def test_each_of_these_records_is_missing_on_the_metrics_page(
    collector: Collector, found: dict[str, Scenario], folder: Path
) -> None:
    expected = dict.fromkeys(CASES, 1.0)
    for case in (*EVERYWHERE, "everywhere_logged"):
        expected |= found[case].results[1]["runs"]
    # One command for all launches: a recorder of each would take a second.
    command = [*FORESHOCK, "recorder", "--dir", str(folder / "rings"), "--collector", collector.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert dropped(collector) == expected


def test_a_training_says_no_warning_even_where_warnings_are_errors(tmp_path: Path) -> None:
    scenario = run_scenarios(tmp_path, SCRIPT, ["plain"], torchrun=True, PYTHONWARNINGS="error")["plain"]
    # Sums were taken, so their success was asked for.
    assert any(sequence > 0 for result in scenario.results for sequence in result)
    assert "warning" not in scenario.stderr.lower() and "deprecat" not in scenario.stderr.lower()


def test_a_training_that_ends_right_after_a_backward_pass_ends_well(job: Job) -> None:
    # A thread of gloo that lets go of a collective while the interpreter ends would abort the process.
    done = job("ends_at_once.py", torchrun=True)
    assert done.returncode == 0, done.stderr
