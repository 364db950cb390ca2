"""One step is short to read: few calls, few moves between files, and the stages in the order of the diagram."""

from __future__ import annotations

import re
import sys
from itertools import groupby

import pytest

from tests.support.repository import ROOT
from tests.support.torch_jobs import run_scenarios

pytestmark = pytest.mark.integration

Calls = list[list[str]]
MOST_CALLS, MOST_MOVES = 80, 40


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Calls]]:
    folder = tmp_path_factory.mktemp("trace")
    found = run_scenarios(folder, "step_trace.py", ["default", "bucket_views"])
    return {name: scenario.results for name, scenario in found.items()}


def moves(calls: Calls) -> int:
    return len(list(groupby(calls, key=lambda call: call[0]))) - 1


def test_a_step_makes_few_calls_and_few_moves_between_files(
    traces: dict[str, list[Calls]], capsys: pytest.CaptureFixture[str]
) -> None:
    for calls in traces["default"]:
        with capsys.disabled():
            sys.stdout.write(f"\none step: {len(calls)} calls, {moves(calls)} moves between files\n")
        assert 40 < len(calls) <= MOST_CALLS, "\n".join(map(" ".join, calls))
        assert moves(calls) <= MOST_MOVES, "\n".join(map(" ".join, calls))


def diagram() -> Calls:
    """Module and name of each call in docs/architecture.md's diagram of a step."""
    text = (ROOT / "docs/architecture.md").read_text()
    found = re.search(r"<!-- step -->(.*?)<!-- /step -->", text, re.DOTALL)
    assert found is not None
    return [[module, name] for name, module in re.findall(r"^ +(\w+\.\w+) +(_[\w.]+) ", found[1], re.MULTILINE)]


def test_the_diagram_of_a_step_is_what_a_step_calls_in_this_order(traces: dict[str, list[Calls]]) -> None:
    drawn = diagram()
    assert len(drawn) > 12
    for calls in traces["default"]:
        rest = iter(calls)
        missing = [call for call in drawn if call not in rest]
        assert missing == []


def test_bucket_views_are_measured_bucket_by_bucket_and_the_default_needs_no_hook(
    traces: dict[str, list[Calls]],
) -> None:
    for default, views in zip(traces["default"], traces["bucket_views"], strict=True):
        assert ["_hooks.ddp", "measure_then_allreduce_hook"] not in default
        assert (
            views.count(["_hooks.ddp", "measure_then_allreduce_hook"])
            == views.count(["_measure.local", "LocalNorms.add"])
            > 1
        )
