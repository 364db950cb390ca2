"""What a script does with its model and optimizer after attach works as without Foreshock, and is measured then."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent.scenarios.training import STEPS
from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

SCRIPT = "changes.py"
CHANGES = [
    "unfused_checkpoint", "fused_checkpoint", "joins_fused", "joins_unfused", "leaves", "freezes_and_unfreezes",
    "schedules", "saves_and_loads", "moves", "averages",
]  # fmt: skip
NEW_PARAMETERS = ["joins_fused", "joins_unfused", "leaves", "freezes_and_unfreezes"]
COPIES = ["copies", "copies_with_bucket_views", "copies_with_a_wrapped_hook"]
OTHERS = ["odd_observations", "nothing_keeps_a_model", "only_the_model_goes", "a_sweep", "in_turn"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("changes"), SCRIPT, [*CHANGES, *COPIES, *OTHERS])


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_clipping_is_that_of_stock_and_norms_are_its_norms(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5) and len(result["norms"]) == STEPS
        assert min(result["norms"]) > 0.5, "nothing was clipped"
    # The ranks' own are of the same parameters: their mean square is never below the square of the average.
    for norm, *local in zip(found[name].results[0]["global"], *(r["local"] for r in found[name].results), strict=True):
        assert sum(each**2 for each in local) / len(local) > 0.999 * norm**2
    changed = [any("the optimizer's parameters have changed" in line for line in lines) for lines in found[name].said]
    assert changed == [name in NEW_PARAMETERS, False]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_watched_model_trains_as_stock_and_writes_nothing(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        for copied in result.values():
            assert copied == {"as stock": True, "silent": True, "goes on": True}


def test_a_step_that_is_no_whole_number_costs_one_line_and_no_record(found: dict[str, Scenario]) -> None:
    for result in found["odd_observations"].results:
        assert result == {"steps": list(range(STEPS)), "told": [True] * STEPS, "dropped": {}}
    assert found["odd_observations"].lines_with("observe: step must be an integer") == [1, 0]


def test_nothing_of_ours_keeps_a_model_alive_and_its_end_is_the_end_of_the_run(found: dict[str, Scenario]) -> None:
    assert found["nothing_keeps_a_model"].results == [{"alive": 0, "exit": "FINISHED"}] * 2
    assert found["only_the_model_goes"].results == [{"before": True, "after": False, "second": True}] * 2


def test_a_training_that_another_one_follows_has_finished_however_its_process_ends(
    found: dict[str, Scenario],
) -> None:
    result: Any
    for result in found["a_sweep"].results:
        assert result == {
            "idle": [True, True, False],
            "exits": ["FINISHED", "FINISHED", "EXCEPTION"],
            "steps": [[0, 1, 2, 3]] * 3,
        }


def test_trainings_in_turn_are_clipped_and_recorded_and_an_idle_one_may_be_attached_to_again(
    found: dict[str, Scenario],
) -> None:
    result: Any
    for result in found["in_turn"].results:
        assert result["apart"] < 1e-4
        assert (result["idle"], result["again"]) == ([True, False], [False, True])
        assert result["steps"] == [[0, 1, 2, 3, 4, 5]] * 2 and result["exits"] == ["NONE", "NONE"]
