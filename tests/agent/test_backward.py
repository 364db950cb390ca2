"""Backward passes inside backward passes, several for one forward pass, and ranks that differ in them."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

CHECKPOINTED = [
    "checkpointed", "checkpointed_in_another_order", "checkpointed_in_a_static_graph", "checkpointed_in_bucket_views",
]  # fmt: skip
ODD = ["twice_on_rank_1", "accumulated_with_backward_outside", "evaluated_before_backward"]
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("backward")
    return run_scenarios(folder, "backward.py", [*CHECKPOINTED, *ODD, "detached_on_rank_1"])


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_reentrant_checkpointing_is_clipped_as_stock_and_measured_from_the_first_step(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["dropped"] == {}
        assert result["global_norm"] == pytest.approx(result["norms"], rel=1e-5) and min(result["norms"]) > 0.5
        assert result["local_norm"][0] == pytest.approx(result["own"], rel=1e-6)
        assert all(norm > 0 for norm in result["local_norm"])
        assert result["reduced_sequence"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert found[name].lines_with("changes gradients") == [0, 0]


@pytest.mark.parametrize("name", ODD)
def test_only_passes_that_average_are_summed_over_ranks(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        assert result["as alone"] and result["dropped"] == {} and all(norm > 0 for norm in result["local_norm"])
        assert result["reduced_sequence"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert result["reduced_idle_ranks"] == [0.0] * STEPS


def test_a_rank_that_has_detached_still_takes_part_in_the_sums(found: dict[str, Scenario]) -> None:
    whole, cut = found["detached_on_rank_1"].results
    assert whole["reduced_idle_ranks"] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert whole["reduced_sequence"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and len(cut["reduced_sequence"]) == 3
