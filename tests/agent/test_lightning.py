"""`ForeshockCallback` in Lightning's Trainer: norms, losses and steps are the trainer's own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.trainers,
    pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed: make test-trainers"),
]

OBSERVED = ["observed", "clips", "accumulates", "validates"]
TAKEN_OVER = ["taken_over", "taken_over_from_none"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    names = [*OBSERVED, *TAKEN_OVER, "resumes", "fails", "detached_meanwhile"]
    return run_scenarios(tmp_path_factory.mktemp("lightning"), "lightning_trainer.py", names)


@pytest.mark.parametrize("name", OBSERVED)
def test_a_trainer_trains_as_alone_and_what_was_measured_is_its_own(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        assert result["same"] and result["stepped"] and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["losses"] == pytest.approx(result["sums"], rel=1e-5)
        assert result["steps"] == list(range(6)) and result["edited"] == [name == "clips"] * 6


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_clipping_is_taken_over_from_a_trainer_whose_arguments_stay_as_they_are(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {} and result["edited"] == [False] * 6
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["coefficients"] == pytest.approx([min(1.0, 0.5 / norm) for norm in result["norms"]], rel=1e-4)
        assert result["left"] == (1.0 if name == "taken_over" else None)
    expected = [1, 0] if name == "taken_over" else [0, 0]
    assert found[name].lines_with("and no longer by the trainer's own 1") == expected


def test_a_resumed_training_goes_on_with_its_steps_and_its_history(found: dict[str, Scenario]) -> None:
    for result in found["resumes"].results:
        assert result == {"history": True, "steps": [6, 7, 8]}


def test_a_training_that_fails_is_detached_and_its_trainer_as_before(found: dict[str, Scenario]) -> None:
    for result in found["fails"].results:
        assert result == {"error": "out of luck", "enabled": False, "left": 1.0}


def test_a_trainer_clips_again_once_nothing_watches(found: dict[str, Scenario]) -> None:
    for result in found["detached_meanwhile"].results:
        assert result == {"clip_vals": [None] * 3 + [1.0] * 3, "left": 1.0}
