"""Adaptive clipping, steps that are left out, and dry runs of both, beside trainings that do it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foreshock._control.decide import TRIP_LAG
from tests.support.torch_jobs import PATHS, Scenario, run_scenarios

pytestmark = pytest.mark.integration

NAMES = [
    "adaptive_fused", "adaptive_unfused", "nan_adamw", "nan_sgd_momentum", "nan_adagrad", "far_beyond_history",
    "early_and_high", "budget_spent", "nan_for_good", "skip_and_clip", "own_clip_and_skip", "scaled_and_skipped",
    "dry_run_of_all", "scaled_value_clip", "resumed", "inherited",
    "refusals",
]  # fmt: skip


@pytest.fixture(scope="module", params=PATHS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("policies")
    return run_scenarios(folder, "policies.py", NAMES, TEST_ARITHMETIC=request.param)


@pytest.mark.parametrize("how", ["fused", "unfused"])
def test_adaptive_clipping_clips_to_what_the_collectors_rule_allows(found: dict[str, Scenario], how: str) -> None:
    for result in found[f"adaptive_{how}"].results:
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["dropped"] == {}
        clipped = []
        steps = zip(result["norms"], result["limits"], result["coefficients"], strict=True)
        for step, (norm, limit, coefficient) in enumerate(steps):
            assert coefficient == pytest.approx(min(1.0, limit / norm), rel=1e-4)
            clipped += [step] if coefficient < 1 else []
        # The limit alone in the beginning, then history below it.
        assert clipped == [3, 45, 46, 55]
        assert [result["limits"][step] == 40.0 for step in clipped] == [True, False, False, False]


def test_a_resumed_job_decides_by_the_history_in_its_checkpoint(found: dict[str, Scenario]) -> None:
    for result in found["resumed"].results:
        assert result["as one"] and not result["as one without history"]
        assert result["without history"] == {} and result["ignored"] is None


def test_a_resumed_job_decides_by_the_history_that_rank_0_has_from_the_collector(found: dict[str, Scenario]) -> None:
    for rank, result in enumerate(found["inherited"].results):
        assert result["as one"]
        for why in ("without an answer", "without a history", "with nonsense"):
            assert not result[f"as one {why}"], why
        assert result["new"] == [0.0, 0.0] and result["resumed on one rank"] == 0.0
        # Rank 0 alone asks, and only where all ranks resume.
        assert result["asked"] == result["asked in the end"] == (0 if rank else 4)
    assert found["inherited"].lines_with("continuing the history of norms") == [1, 0]


@pytest.mark.parametrize("kind", ["adamw", "sgd_momentum", "adagrad"])
def test_a_step_that_is_not_finite_is_left_out_bit_for_bit_even_the_first(
    found: dict[str, Scenario], kind: str
) -> None:
    for result in found[f"nan_{kind}"].results:
        assert result["as stock"] and result["finite"] and result["dropped"] == {}
        assert result["skipped"] == [0, 4, 5] and result["kinds"] == [0.0, 1.0]
        # An optimizer that counts has counted the steps that it made.
        assert result["counters"] == ([] if kind == "sgd_momentum" else [6.0])
        assert result["left"] == [None, None] and not any(result["tripped"])


def test_a_step_far_beyond_history_is_left_out_and_a_usual_spike_is_not(found: dict[str, Scenario]) -> None:
    for result in found["far_beyond_history"].results:
        assert result["as stock"] and result["skipped"] == [33, 36]
    for result in found["early_and_high"].results:
        assert result["as stock"] and result["skipped"] == []


def test_a_spent_budget_leaves_no_more_out_and_trips_all_ranks_at_the_same_step(found: dict[str, Scenario]) -> None:
    results = found["budget_spent"].results
    for result in results:
        assert result["as stock"] and result["finite"] and result["skipped"] == [30, 33, 36, 39, 42]
        assert result["tripped"] == [step >= 45 + TRIP_LAG for step in range(60)]
    for result in found["nan_for_good"].results:
        assert result["skipped"] == [3, 4, 5] and not result["finite"]
        assert result["tripped"] == [step >= 6 + TRIP_LAG for step in range(20)]


def test_clipping_and_leaving_out_go_together(found: dict[str, Scenario]) -> None:
    for result in found["skip_and_clip"].results:
        assert result["as stock"] and result["skipped"] == [0, 4, 5] and result["left"] == [None, None]


def test_a_script_that_clips_by_itself_may_have_steps_left_out(found: dict[str, Scenario]) -> None:
    for result in found["own_clip_and_skip"].results:
        assert result["as stock"] and result["skipped"] == [float(step == 4) for step in range(8)]


def test_overflows_of_a_scaler_cost_no_budget_and_a_spike_leaves_its_scale_alone(found: dict[str, Scenario]) -> None:
    for result in found["scaled_and_skipped"].results:
        assert result["apart"] < 1e-6 and result["dropped"] == {}
        assert result["skipped"] == [*range(2, 9), 40] and not result["tripped"]
        assert result["scales"][0] == result["scales"][1] == 2.0**13


def test_a_dry_run_changes_not_a_bit_and_counts(found: dict[str, Scenario]) -> None:
    scenario = found["dry_run_of_all"]
    for result in scenario.results:
        for seen in result.values():
            assert seen["as stock"] and seen["quiet"] and seen["dropped"] == {}
            assert seen["counts"]["steps"] == 36 and seen["counts"]["skipped"] == 2
            assert [step for step, bits in enumerate(seen["shadow"]) if int(bits) & 2] == [30, 33]
            assert seen["counts"]["clipped"] == sum(int(bits) & 1 for bits in seen["shadow"]) > 0
        assert [int(bits) & 1 for bits in result["norm"]["shadow"]] == [norm > 0.5 for norm in result["norm"]["norms"]]
        assert [int(bits) & 1 for bits in result["adaptive"]["shadow"]][:25] == [0] * 25
    assert (
        sum("dry run: of 36 steps 36 would have been clipped and 2 skipped" in line for line in scenario.said[0]) >= 1
    )
    assert not any("dry run: of" in line for line in scenario.said[1])


def test_clipping_by_value_under_a_scaler_compares_unscaled_elements(found: dict[str, Scenario]) -> None:
    for result in found["scaled_value_clip"].results:
        assert result["apart"] < 1e-5


REFUSED: list[tuple[str, str]] = [
    (
        "not fused",
        "SettingsError: skip: AdamW is not fused, so skipping a step would require reading from the device; use",
    ),
    ("no fused path", "SettingsError: skip: NAdam is not fused, so skipping a step would require"),
    ("dampening", "SettingsError: skip: SGD with dampening must not skip its first step; use"),
    ("nothing to try", "SettingsError: dry_run: nothing to simulate; also pass clip or skip"),
    ("skip on rank 1 alone", "AttachError: skip differs: False on rank 0, True on rank 1; it must be the same on"),
    ("another experiment on rank 1", "AttachError: experiment differs: default on rank 0, other on rank 1; it must"),
]


@pytest.mark.parametrize(("what", "line"), REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line_on_every_rank(
    found: dict[str, Scenario], what: str, line: str
) -> None:
    for result in found["refusals"].results:
        assert result[what].startswith(line) and "\n" not in result[what]


def test_the_environment_has_twins_for_all_of_it(tmp_path: Path) -> None:
    results: list[Any] = run_scenarios(
        tmp_path,
        "policies.py",
        ["refusals"],
        FORESHOCK_SKIP="0",
        FORESHOCK_CLIP="adaptive",
        FORESHOCK_DRY_RUN="",
    )["refusals"].results
    # With a clip from the environment, there is something to try.
    assert all(result["nothing to try"] is None for result in results)
