"""`attach` takes the model and the optimizer that Accelerate has prepared."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.trainers,
    pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed: make test-trainers"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("accelerate"), "accelerated.py", ["clips", "logs_norms"])


def test_a_loop_that_accumulates_and_clips_trains_as_alone_and_has_its_norms(found: dict[str, Scenario]) -> None:
    for result in found["clips"].results:
        assert result["same"] and result["dropped"] == {} and result["edited"] == [True] * 6
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)


def test_a_loop_that_logs_the_norm_is_clipped_as_stock(found: dict[str, Scenario]) -> None:
    for result in found["logs_norms"].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {} and result["edited"] == [False] * 6
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
