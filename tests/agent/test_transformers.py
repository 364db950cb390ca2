"""`ForeshockCallback` in Hugging Face's Trainer: norms, losses and steps equal what the trainer logs."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.trainers,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: make test-trainers"),
]

OBSERVED = ["clips", "clips_nothing", "accumulates", "evaluates"]
TAKEN_OVER = ["taken_over", "taken_over_from_none"]
OTHERS = ["fails_first", "detached_meanwhile", "shows_progress"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("trainer"), "trainer.py", [*OBSERVED, *TAKEN_OVER, *OTHERS])


@pytest.mark.parametrize("name", OBSERVED)
def test_a_trainer_trains_as_alone_and_its_logs_are_what_was_measured(found: dict[str, Scenario], name: str) -> None:
    results = found[name].results
    for result in results:
        assert result["same"] and result["same logs"] and result["stepped"] and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["steps"] == list(range(6))
        # With `max_grad_norm=0` the trainer multiplies gradients by 1, to log their norm.
        assert result["edited"] == [name != "clips_nothing"] * 6
    # The trainer logs the mean over the ranks, to four digits.
    means = [sum(losses) / len(losses) for losses in zip(*(result["losses"] for result in results), strict=True)]
    assert means == pytest.approx(results[0]["logged"], abs=1e-3)


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_clipping_is_taken_over_from_a_trainer_whose_logs_and_arguments_stay_as_they_are(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {} and result["edited"] == [False] * 6
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["norms"] == pytest.approx(result["alone's norms"], rel=1e-4)
        assert result["coefficients"] == pytest.approx([min(1.0, 0.5 / norm) for norm in result["norms"]], rel=1e-4)
        assert result["left"] == (1.0 if name == "taken_over" else 0.0)
    expected = [1, 0] if name == "taken_over" else [0, 0]
    assert found[name].lines_with("and no longer by the trainer's own 1") == expected


def test_a_trainer_that_failed_is_attached_again_and_its_checkpoints_contain_its_own_arguments(
    found: dict[str, Scenario],
) -> None:
    for rank, result in enumerate(found["fails_first"].results):
        assert result["error"] == "out of luck" and result["detached"]
        assert result["coefficients"] == pytest.approx([min(1.0, 0.5 / norm) for norm in result["norms"]], rel=1e-4)
        assert result["left"] == 1.0
        # Rank 0 saves.
        assert result["saved"] == ([] if rank else [1.0, 1.0])


def test_a_trainer_clips_again_once_nothing_watches(found: dict[str, Scenario]) -> None:
    for result in found["detached_meanwhile"].results:
        assert min(result["norms"][:3]) > 0.1
        assert result["norms"][3:] == pytest.approx([0.1] * 3, rel=1e-3) and result["left"] == 0.1


def test_no_line_of_foreshock_is_on_the_line_of_a_progress_bar(found: dict[str, Scenario]) -> None:
    lines = found["shows_progress"].said[0]
    assert any("6/6" in line for line in lines)
    ours = [line for line in lines if "foreshock: " in line]
    assert any("the script changes gradients between backward and step" in line for line in ours)
    assert all(line.startswith("foreshock: ") for line in ours), ours


def test_on_a_device_too_a_trainer_that_multiplies_by_1_is_clipped_by_foreshock(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("device")
    found = run_scenarios(folder, "trainer.py", ["clips_nothing", "taken_over", "one_nan"], TEST_ARITHMETIC="device")
    for name, limit in (("clips_nothing", math.inf), ("taken_over", 0.5)):
        for result in found[name].results:
            assert result["dropped"] == {} and result["edited"] == [False] * 6
            expected = [min(1.0, limit / norm) for norm in result["norms"]]
            assert result["coefficients"] == pytest.approx(expected, rel=1e-4)
    for result in found["one_nan"].results:
        assert result == {"global_nan_parameters": 1, "first_nonfinite_global": 0}
