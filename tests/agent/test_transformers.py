"""`ForeshockCallback` in Hugging Face's Trainer: norms, losses and steps equal what the trainer logs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: pip install it"),
]

NAMES = ["clips", "clips_nothing", "accumulates"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("trainer"), "trainer.py", NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_trains_as_alone_and_its_logs_are_what_was_measured(found: dict[str, Scenario], name: str) -> None:
    results = found[name].results
    for result in results:
        assert result["same"] and result["same logs"] and result["stepped"] and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["steps"] == list(range(6))
    # The trainer logs the mean over the ranks, to four digits.
    means = [sum(losses) / len(losses) for losses in zip(*(result["losses"] for result in results), strict=True)]
    assert means == pytest.approx(results[0]["logged"], abs=1e-3)
