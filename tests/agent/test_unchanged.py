"""Scripts in public styles that know nothing of Foreshock train as alone under `foreshock run`, and are measured."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

REPLICATED = [
    "plain", "fused", "accumulates", "accumulates_with_sync", "scaled", "scaled_fused", "two_losses",
    "gradient_penalty", "average_of_weights", "frozen_teacher", "checkpointed", "bucket_views", "static_graph",
    "compiled", "sam", "gan", "unfreezes",
]  # fmt: skip
WATCHED = [*REPLICATED, "sharded"]
OTHERS = ["lbfgs", "clips_by_itself", "unwrapped", "attaches_by_itself"]
CHANGE_GRADIENTS = [
    "nanogpt", "mingpt", "dino", "mae", "detr", "timm", "torchvision", "fairseq", "ppo", "lora", "distillation", "byol",
]  # fmt: skip
"""Styles of public repositories that change gradients before the step."""
ALL = [*WATCHED, *OTHERS, *CHANGE_GRADIENTS, "logs_norms"]
WATCHES = {"gan": 2, "unfreezes": 2, "unwrapped": 0, "attaches_by_itself": 2}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("unchanged"), "unchanged.py", ALL)


@pytest.mark.parametrize("name", ALL)
def test_an_unchanged_script_trains_as_alone_bit_for_bit(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        assert result["same"] and result["same losses"]
        assert len(result["watches"]) == WATCHES.get(name, 1)
        assert all(watch["dropped"] == {} for watch in result["watches"])


def alike(values: list[float], expected: list[float]) -> bool:
    """Also where both are NaN."""
    return values == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", WATCHED)
def test_each_record_of_an_unchanged_script_has_its_own_norm_and_loss(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        for watch, norms, losses in zip(result["watches"], result["norms"], result["losses"], strict=True):
            assert all(watch["stepped"]) and alike(watch["norms"], norms)
            # The first step is what it attaches at: its backward pass is over. A step that a fused optimizer's scaler
            # skips is in the record of steps, and not in the script's list.
            skipped = len(norms) - len(losses)
            assert watch["losses"][0] is None and alike(watch["losses"][1:], losses[1 - skipped :])
            if name in REPLICATED:
                assert watch["local"][0] == 0.0 and min(watch["local"][1:]) > 0.0


def test_a_step_with_a_closure_is_measured_after_it(found: dict[str, Scenario]) -> None:
    for result in found["lbfgs"].results:
        (watch,), (norms,) = result["watches"], result["norms"]
        # Before each closure there was the gradient of the one before.
        assert alike(watch["norms"][:-1], norms[1:]) and None not in watch["losses"]


def test_what_a_script_clips_by_itself_is_measured_before_that_from_the_second_step_on(
    found: dict[str, Scenario],
) -> None:
    for result in found["clips_by_itself"].results:
        (watch,) = result["watches"]
        assert watch["norms"][0] == pytest.approx(0.5) and min(watch["norms"][1:]) > 1.0
    assert found["clips_by_itself"].lines_with("the script changes gradients between backward and step") == [1, 0]


@pytest.mark.parametrize("name", CHANGE_GRADIENTS)
def test_a_public_style_that_changes_gradients_is_measured_before_that(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        (watch,), (losses,) = result["watches"], result["losses"]
        # The first step is measured as its optimizer finds it: its backward pass was over before anything watched.
        assert alike(watch["norms"], [result["norms"][0][0], *result["norms before its changes"][1:]])
        assert all(watch["stepped"]) and watch["losses"][0] is None and alike(watch["losses"][1:], losses[1:])
        assert watch["edited"].count(True) >= 3
    assert found[name].lines_with("the script changes gradients between backward and step") == [1, 0]


def test_a_script_that_logs_norms_by_a_clipping_call_is_not_taken_for_one_that_clips(
    found: dict[str, Scenario],
) -> None:
    for result in found["logs_norms"].results:
        (watch,) = result["watches"]
        assert alike(watch["norms"], result["norms before its changes"]) and not any(watch["edited"])
    assert found["logs_norms"].lines_with("the script changes gradients") == [0, 0]


def test_a_model_that_nobody_averages_is_named_once_and_left_alone(found: dict[str, Scenario]) -> None:
    line = "not watching AdamW: no DDP or sharded model, nor that of a process that trains alone, holds its parameters"
    assert found["unwrapped"].lines_with(line) == [1, 0]


def test_a_script_that_attaches_by_itself_wins(found: dict[str, Scenario]) -> None:
    for result in found["attaches_by_itself"].results:
        automatic, own = result["watches"]
        assert not automatic["enabled"] and len(automatic["norms"]) == 2
        assert own["enabled"] and own["from the script"] and len(own["norms"]) == 4
        # As the script has asked.
        assert own["local"] == [0.0] * 4 and own["losses"] == [None] * 4
