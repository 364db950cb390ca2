"""A DDP model of one rank keeps its own gradients, without a division and a sum, and trains as stock bit for bit."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

AS_STOCK = ["plain", "views", "static", "unused"]
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("one_rank"), "one_rank.py", [*AS_STOCK, "own_hook", "another_group"])


@pytest.mark.parametrize("name", AS_STOCK)
def test_it_trains_as_stock_bit_for_bit(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        assert result["same"] and result["dropped"] == {}
        # The slot is the script's until the first backward pass.
        assert result["free"] and result["hook"]
        assert len(result["global_norm"]) == STEPS and min(result["global_norm"]) > 0
        assert result["local_norm"] == result["global_norm"]


def test_a_hook_that_the_script_registers_after_attach_is_the_only_one(found: dict[str, Scenario]) -> None:
    for result in found["own_hook"].results:
        assert result["passes"] == STEPS and result["dropped"] == {}


def test_ranks_that_get_a_common_group_average_again(found: dict[str, Scenario]) -> None:
    assert found["another_group"].results == [True, True]
