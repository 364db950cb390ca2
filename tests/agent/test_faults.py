"""An internal error of the probe costs a record: never the run, its weights, or a collective."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.agent.conftest import Job, Scenario, run_scenarios

SCRIPT = "fault_scenarios.py"
SITES = [
    "bucket", "last_bucket", "contribution", "end_of_backward", "edits", "launch", "norms", "summary", "clip",
    "rule", "collect", "row", "observe", "hook_order",
]  # fmt: skip
CASES = [f"{site}_{kind}" for site, kind in product(SITES, ("fused", "unfused"))]
STEPS = [0, 1, 2, 3, 4, 5]
FAILING = 3
WITHOUT_ROW = {"norms", "summary", "clip", "rule", "collect", "row"}
"""Where the record of that step stays without its measured part; elsewhere it is whole."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("faults"), SCRIPT, CASES, FORESHOCK_STRICT="")


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
    assert bad["steps"] == (without if site == "launch" else STEPS)
    assert bad["measured"] == (without if site in WITHOUT_ROW | {"launch"} else STEPS)
    if site in {"bucket", "last_bucket"}:
        assert bad["local"][str(FAILING)] == 0.0, "a norm without one bucket would be a wrong norm"
    others = [norm for step, norm in bad["local"].items() if step != str(FAILING)]
    assert all(norm > 0 for norm in others)
    ((line,), nothing) = ([line for line in lines if "internal error" in line] for lines in reversed(found[case].said))
    assert "costs a step record, training goes on" in line and nothing == []


def test_a_training_says_no_warning_even_where_warnings_are_errors(tmp_path: Path) -> None:
    scenario = run_scenarios(tmp_path, SCRIPT, ["plain"], PYTHONWARNINGS="error")["plain"]
    # Sums were taken, so their success was asked for.
    assert any(sequence > 0 for result in scenario.results for sequence in result)
    assert "warning" not in scenario.stderr.lower() and "deprecat" not in scenario.stderr.lower()


def test_a_training_that_ends_right_after_a_backward_pass_ends_well(job: Job) -> None:
    # A thread of gloo that lets go of a collective while the interpreter ends would abort the process.
    done = job("ends_at_once.py")
    assert done.returncode == 0, done.stderr
