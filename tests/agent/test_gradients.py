"""What is measured and clipped in odd circumstances, beside stock PyTorch on the same seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torch_jobs import ARITHMETIC, PATHS, Scenario, run_scenarios

pytestmark = pytest.mark.integration

UNVERSIONED = ["own_clip_through_data", "own_clip_by_new_data", "own_clip_of_the_middle"]
"""Edits that change the version of neither the first nor the last gradient."""
NAMES = [
    "value_clip", "bfloat16", "scaler_fused", "scaler_unfused", "scaler_fused_unscaled_by_the_script",
    "scaler_not_enabled",
    "own_clip_fused", "own_clip_unfused", "own_value_clip", "own_clip_and_scaler_fused",
    "own_clip_and_scaler_unfused", *UNVERSIONED,
    "unused_parameters", "accumulated", "a_step_that_raised",
]  # fmt: skip
NOBODY = -1.0


@pytest.fixture(scope="module", params=PATHS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("gradients")
    return run_scenarios(folder, "gradients.py", NAMES, TEST_ARITHMETIC=request.param)


def test_value_clipping_is_stock_value_clipping_bit_for_bit(found: dict[str, Scenario]) -> None:
    assert found["value_clip"].results == [[True, True, True]] * 2


def test_norms_of_a_bfloat16_model_are_accumulated_in_float32(found: dict[str, Scenario]) -> None:
    for result in found["bfloat16"].results:
        assert result["global"] == pytest.approx(result["double"], rel=5e-5)
        assert result["local"] == pytest.approx(result["double"], rel=5e-5)
        # What a norm in bfloat16 makes of the same gradients would not pass for that.
        assert result["narrow"] != pytest.approx(result["double"], rel=5e-5)


@pytest.mark.parametrize("how", ["fused", "unfused", "fused_unscaled_by_the_script"])
def test_under_a_grad_scaler_norms_are_unscaled_and_clipping_is_stock(found: dict[str, Scenario], how: str) -> None:
    scenario = found[f"scaler_{how}"]
    # An optimizer that is not fused is not called at all for a step that overflowed.
    overflow = [] if how == "unfused" else [3]
    steps = [0, 1, 2, *overflow, 4, 5, 6, 7]
    scales = [1024.0] * (3 + len(overflow)) + [512.0] * 4
    for result in scenario.results:
        assert result["apart"] < 1e-4 and result["dropped"] == {} and True not in result["edited"]
        expected = [result["norms"][step] for step in steps]
        # All ranks have the same batches here: local and global norms are the same.
        for name in ("global_norm", "local_norm"):
            assert result[name] == pytest.approx(expected, rel=1e-5, nan_ok=True), name
        # Looked at on the first step, and then only after a hundred.
        looked, *later = result["gradient_absolute_maximum"]
        assert looked == pytest.approx(result["largest"][0], rel=1e-5) and set(later) == {0.0}
        assert result["loss_scale"] == scales
        assert result["skipped"] == [float(step == 3) for step in steps]
        for step, norm, coefficient in zip(steps, expected, result["clip_coefficient"], strict=True):
            assert coefficient == pytest.approx(1.0 if step == 3 else 0.5 / norm, rel=1e-5)
        squares = [0.0 if step == 3 else 2 * norm**2 for step, norm in zip(steps, expected, strict=True)]
        assert result["reduced_square_sum"] == pytest.approx(squares, rel=1e-5)
    assert not any("changes gradients" in line for lines in scenario.said for line in lines)


def test_a_grad_scaler_that_is_not_enabled_scales_nothing(found: dict[str, Scenario]) -> None:
    for result in found["scaler_not_enabled"].results:
        assert result["global"] == pytest.approx(result["norms"], rel=1e-6)
        assert result["scale"] == [1.0] * 6 and result["dropped"] == {}


@pytest.mark.parametrize("how", ["clip_fused", "clip_unfused", "value_clip"])
def test_a_scripts_own_clipping_is_never_doubled_and_said_once(found: dict[str, Scenario], how: str) -> None:
    scenario = found[f"own_{how}"]
    for result in scenario.results:
        assert result["as alone"]
        assert result["edited"] == [True] * 6 and result["coefficient"] == [1.0] * 6
        # What is reported is from before the script's clipping.
        assert result["global"] == pytest.approx(result["norms"], rel=1e-6)
    assert scenario.lines_with("changes gradients between backward and step") == [1, 0]


@pytest.mark.parametrize("how", ["fused", "unfused"])
def test_a_script_that_unscales_and_clips_by_itself_trains_as_alone_and_has_its_norms(
    found: dict[str, Scenario], how: str
) -> None:
    scenario = found[f"own_clip_and_scaler_{how}"]
    for result in scenario.results:
        assert result["as alone"]
        # From before its clipping, and without the scale; all ranks have the same batches here.
        for name in ("global_norm", "local_norm"):
            assert result[name] == pytest.approx(result["norms"], rel=1e-5), name
        assert result["loss_scale"] == [1000.0 * 2**step for step in range(6)]
        assert result["reduced_square_sum"] == pytest.approx([2 * norm**2 for norm in result["norms"]], rel=1e-5)
        assert result["clip_coefficient"] == [1.0] * 6
    assert scenario.lines_with("changes gradients between backward and step") == [1, 0]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_a_rank_that_is_alone_has_the_averaged_gradient_for_its_own(arithmetic: str, tmp_path: Path) -> None:
    told = run_scenarios(tmp_path, "gradients.py", ["alone"], ranks=1, TEST_ARITHMETIC=arithmetic)["alone"]
    (result,) = told.results
    for name in ("global_norm", "local_norm"):
        assert result[name] == pytest.approx(result["norms"], rel=1e-5, nan_ok=True)
    assert result["loss_scale"] == [1024.0] * 3 + [512.0] * 2 + [256.0]
    assert result["local_nan_parameters"] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert result["local_inf_parameters"] == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    # In the model's order the weight comes first, in backward order the bias.
    assert result["first_nonfinite_global"] == [NOBODY, NOBODY, 1.0, NOBODY, 2.0, NOBODY]
    assert result["first_nonfinite_local"] == [NOBODY, NOBODY, 2.0, NOBODY, 2.0, NOBODY]
    assert result["reduced_sequence"] == [0.0] * 6, "there is nobody to sum with"


def test_unused_parameters_are_no_nan_and_clip_as_stock(found: dict[str, Scenario]) -> None:
    for result in found["unused_parameters"].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {}
        assert all(0 < norm < 100 for norm in result["norms"])
        assert result["nan"] == 0.0 and result["first"] == [NOBODY]


def test_accumulated_gradients_are_measured_as_a_whole(found: dict[str, Scenario]) -> None:
    for result in found["accumulated"].results:
        assert result["local"] == pytest.approx(result["expected local"], rel=1e-5)
        assert result["global"] == pytest.approx(result["expected global"], rel=1e-5)
        assert result["alike"] == 0.0


def test_an_optimizer_that_raised_leaves_nothing_behind_for_the_next_step(found: dict[str, Scenario]) -> None:
    for result in found["a_step_that_raised"].results:
        assert result["global"] == pytest.approx(result["norms"], rel=1e-6)
        assert result["scale"] == [1.0] * 4 and result["left"] is None


@pytest.mark.parametrize("name", UNVERSIONED)
def test_a_scripts_own_clipping_that_shows_in_the_norm_only_is_noticed_and_never_doubled(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        noticed = result["edited"].index(True)
        # A CPU's host compares at once, and marks the records after that; a device answers eight steps later.
        assert noticed in (1, 8) and all(result["edited"][noticed:])
        first = 0 if noticed == 1 else noticed
        assert result["coefficient"][first:] == [1.0] * (12 - first)
        assert result["global"][first:] == pytest.approx(result["norms of ours"][first:], rel=1e-5)
        if noticed == 1:
            assert result["as alone"]
    assert found[name].lines_with("changes gradients between backward and step") == [1, 0]
