"""NaN and Inf in a gradient: told apart, with the rank and the parameter that had them first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torch_jobs import PATHS, Scenario, run_scenarios

pytestmark = pytest.mark.integration

NAMES = ["nan_on_rank_1", "inf_on_rank_0", "nan_and_inf", "inf_of_both_signs", "nan_at_the_first_step"]
NOBODY = -1.0
BAD = 2
"""The step with the bad value."""


@pytest.fixture(scope="module", params=PATHS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("nonfinite")
    return run_scenarios(folder, "nonfinite.py", NAMES, TEST_ARITHMETIC=request.param)


def at_bad_step(result: dict[str, Any], *names: str) -> list[Any]:
    return [result[name][BAD] for name in names]


@pytest.mark.parametrize(
    ("name", "global_", "locals_", "ranks"),
    [
        # norm, NaN parameters, Inf parameters, first of them: in the model's order; each rank's own in backward order
        ("nan_on_rank_1", ("nan", 2, 0, 2), [("4.87", 0, 0, NOBODY), ("nan", 2, 0, 4)], (1, 0)),
        ("inf_on_rank_0", ("inf", 0, 2, 0), [("inf", 0, 2, 3), ("6.41", 0, 0, NOBODY)], (0, 1)),
        ("nan_and_inf", ("nan", 1, 1, 1), [("inf", 0, 1, 1), ("nan", 1, 0, 3)], (1, 1)),
        # Both ranks have an Inf, and their sum is a NaN that neither has.
        ("inf_of_both_signs", ("nan", 1, 0, 5), [("inf", 0, 1, 5), ("inf", 0, 1, 5)], (0, 2)),
    ],
)
def test_nan_and_inf_are_told_apart_and_the_rank_and_parameter_named(
    found: dict[str, Scenario],
    name: str,
    global_: tuple[Any, ...],
    locals_: list[tuple[Any, ...]],
    ranks: tuple[int, int],
) -> None:
    for result, local in zip(found[name].results, locals_, strict=True):
        assert result["global"][BAD] == global_[0] and result["local"][BAD].startswith(local[0])
        assert at_bad_step(result, "global_nan_parameters", "global_inf_parameters", "first_nonfinite_global") == list(
            global_[1:]
        )
        assert at_bad_step(result, "local_nan_parameters", "local_inf_parameters", "first_nonfinite_local") == list(
            local[1:]
        )
        assert at_bad_step(result, "reduced_sequence", "reduced_nan_ranks", "reduced_inf_ranks") == [BAD + 1, *ranks]
        # Clipping cures no gradient that is not finite, and does not try to.
        assert result["clip_coefficient"][BAD] == 1.0
        for step in range(BAD):
            assert result["first_nonfinite_global"][step] == result["first_nonfinite_local"][step] == NOBODY
            assert result["reduced_nan_ranks"][step] == result["reduced_inf_ranks"][step] == 0.0


def test_at_the_very_first_step_too_each_rank_names_its_first_bad_parameter_in_backward_order(
    found: dict[str, Scenario],
) -> None:
    # DDP has not put its buckets into the order of arrival yet.
    (none, _), (bad, _) = (result["first_nonfinite_local"] for result in found["nan_at_the_first_step"].results)
    assert (none, bad) == (NOBODY, 4.0)
    assert found["nan_at_the_first_step"].results[1]["first_nonfinite_global"][0] == 1.0
