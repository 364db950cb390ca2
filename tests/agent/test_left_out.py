"""What a script observes or measures and then leaves out is a record too: once, with its own loss and step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.torch_jobs import PATHS, Scenario, run_scenarios

pytestmark = pytest.mark.integration

SCRIPT = "left_out.py"
NAMES = [
    "continues_before_backward", "continues_and_only_rank_0_observes", "continues_before_step",
    "continues_before_step_and_zeroes", "continues_before_step_with_bucket_views",
    "continues_before_step_and_never_observes", "accumulates_and_observes_each", "accumulates_without_a_word",
    "accumulates_in_bucket_views", "scaler_nan_before", "scaler_nan_between", "scaler_nan_after", "scaler_inf_before",
    "scaler_inf_after", "ends_with_what_was_told", "an_optimizer_that_never_steps", "another_optimizer_steps", "gan",
    "dropped_by_zero_grad",
]  # fmt: skip
STEPS, BAD = 9, 5


@pytest.fixture(scope="module", params=PATHS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("left_out"), SCRIPT, NAMES, TEST_ARITHMETIC=request.param)


def steps(records: list[dict[str, Any]], *, stepped: bool = True) -> list[int]:
    return [record["step"] for record in records if record["stepped"] is stepped]


def nothing_to_it(records: list[dict[str, Any]]) -> bool:
    """Gradients that a script drops by design. On a device nobody knows at once that they are finite: the collector
    leaves those records out."""
    return all(r["loss"] is None and math.isfinite(r["global_norm"]) for r in records if not r["stepped"])


def test_a_batch_left_out_before_backward_is_a_record_on_every_rank(found: dict[str, Scenario]) -> None:
    for rank, records in enumerate(found["continues_before_backward"].results):
        assert [record["step"] for record in records] == list(range(STEPS))
        assert steps(records, stepped=False) == [BAD]
        left_out = records[BAD]
        assert left_out["unknown"] and math.isnan(left_out["loss"]) == (rank == 1)
        # No backward pass came before it: nothing was measured.
        assert left_out["global_norm"] == left_out["local_norm"] == 0.0
        assert all(r["global_norm"] > 0 and r["local_norm"] > 0 for r in records if r["stepped"])


def test_where_only_one_rank_observes_the_records_of_all_still_meet(found: dict[str, Scenario]) -> None:
    observing, other = found["continues_and_only_rank_0_observes"].results
    # It cannot have a record of what the others know nothing of.
    assert [r["global_norm"] for r in observing] == [r["global_norm"] for r in other]
    assert steps(observing) == [step for step in range(STEPS) if step != BAD]


@pytest.mark.parametrize(
    "name",
    ["continues_before_step", "continues_before_step_and_zeroes", "continues_before_step_with_bucket_views"],
)
def test_a_step_left_out_after_backward_is_a_record_with_what_was_measured(
    found: dict[str, Scenario], name: str
) -> None:
    for rank, records in enumerate(found[name].results):
        assert [record["step"] for record in records] == list(range(STEPS))
        if name == "continues_before_step_and_zeroes":
            # What was not a number when it was zeroed is one again, and the same gradients are there.
            assert steps(records, stepped=False) == [BAD, BAD + 2]
        first, second = records[BAD], records[BAD + 2]
        assert first["unknown"] and not second["unknown"] and math.isnan(second["global_norm"])
        assert second["global_nan_parameters"] > 0
        for record in (first, second):
            assert not record["stepped"] and math.isnan(record["loss"]) == (rank == 1)
            # This rank's own gradient was measured before the averaging, and is told in any case.
            assert (record["local_nan_parameters"] > 0) == (rank == 1)


def test_without_a_word_from_the_script_what_is_not_finite_is_a_record(found: dict[str, Scenario]) -> None:
    for records in found["continues_before_step_and_never_observes"].results:
        assert len(steps(records)) == STEPS - 2
        # Of the first nothing was measured: from then on each is.
        (left_out,) = [record for record in records if not record["stepped"]]
        assert math.isnan(left_out["global_norm"]) and left_out["loss"] is None


@pytest.mark.parametrize(
    "name", ["accumulates_and_observes_each", "accumulates_without_a_word", "accumulates_in_bucket_views"]
)
def test_gradients_that_accumulate_over_several_passes_are_one_record(found: dict[str, Scenario], name: str) -> None:
    for records in found[name].results:
        assert steps(records) == [0, 1, 2, 3] and len(records) == 4


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_step_that_a_scaler_leaves_out_has_its_own_record_and_shifts_no_other(
    found: dict[str, Scenario], when: str
) -> None:
    for records in found[f"scaler_nan_{when}"].results:
        assert [record["step"] for record in records] == list(range(30))
        left_out = steps(records, stepped=False)
        assert left_out[0] == 0 and 20 in left_out and len(left_out) < 20
        assert [record["step"] for record in records if math.isnan(record["loss"])] == [20]
        assert records[20]["loss_scale"] > 1.0
        assert not any(record["unknown"] for record in records)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_first_step_that_a_scaler_leaves_out_late_tells_its_loss_and_scale(
    found: dict[str, Scenario], when: str
) -> None:
    for records in found[f"scaler_inf_{when}"].results:
        assert [record["step"] for record in records] == list(range(30))
        assert steps(records, stepped=False) == [20]
        assert math.isinf(records[20]["loss"]) and records[20]["loss_scale"] == 1024.0
        # Where the loss is told after the step it shows at once that there was none, and the gradients are there.
        assert records[20]["unknown"] == (when == "before")


def test_a_run_that_ends_before_its_step_tells_what_was_told_and_what_can_be_measured(
    found: dict[str, Scenario],
) -> None:
    for result in found["ends_with_what_was_told"].results:
        for what, records in result.items():
            assert [(r["step"], r["stepped"]) for r in records] == [(0, True), (1, True), (2, False)], what
            assert math.isnan(records[2]["loss"]), what
            assert records[2]["unknown"] == (what in ("told", "raised")), what
            assert math.isnan(records[2]["global_norm"]) == (what in ("measured", "clipped")), what


@pytest.mark.parametrize("name", ["an_optimizer_that_never_steps", "another_optimizer_steps"])
def test_an_optimizer_that_does_not_step_is_told_of_once(found: dict[str, Scenario], name: str) -> None:
    for records in found[name].results:
        assert steps(records) == [] and nothing_to_it(records)
    assert found[name].lines_with("the watched optimizer has not stepped for 8 backward passes") == [1, 0]


def test_two_models_that_train_in_turn_are_both_watched_and_keep_their_own(found: dict[str, Scenario]) -> None:
    for result in found["gan"].results:
        assert result["enabled"] == [True, True]
        assert steps(result["g"]) == list(range(8)) and steps(result["d"]) == list(range(24))
        assert nothing_to_it(result["g"]) and nothing_to_it(result["d"])
    assert not any(
        "counts as finished" in line or "has not stepped" in line for lines in found["gan"].said for line in lines
    )


def test_no_gradient_outlives_zero_grad(found: dict[str, Scenario]) -> None:
    for left in found["dropped_by_zero_grad"].results:
        assert left and set(left) == {0}
