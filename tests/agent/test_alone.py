"""A process that trains without a process group is watched as a job of one rank, and what trainers wrap is found."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

AS_STOCK = [
    "clipped", "observed", "fused", "accumulated", "closure", "checkpointed", "unused", "compiled", "fabric",
    "compiled_fabric", "accelerated", "lightning",
]  # fmt: skip
OTHERS = ["clips_by_itself", "skips_a_step", "refusals"]
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("alone"), "alone.py", [*AS_STOCK, *OTHERS], ranks=1)


@pytest.mark.parametrize("name", AS_STOCK)
def test_a_process_without_a_group_trains_as_stock_and_has_its_norms(found: dict[str, Scenario], name: str) -> None:
    (result,) = found[name].results
    assert result["apart"] < 1e-5 and result["dropped"] == {} and result["hooks"] == 0
    if name == "observed":
        assert result["same"]
    assert result["stepped"] and result["steps"] == list(range(STEPS))
    assert result["losses"] == [float(step) for step in range(STEPS)]
    # What a single rank has computed is the average.
    assert result["local"] == result["global"] and min(result["global"]) > 0.5
    if name != "closure":
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)


def test_it_is_named_as_one_rank(found: dict[str, Scenario]) -> None:
    line, *_ = found["clipped"].said[0]
    assert "watching Sequential (3 layers, 6 parameters) on 1 rank, clipping by norm 0.5" in line


def test_its_own_clipping_is_never_doubled_and_norms_are_those_before(found: dict[str, Scenario]) -> None:
    (result,) = found["clips_by_itself"].results
    assert all(result["edited"]) and set(result["coefficients"]) == {1.0}
    assert result["global"] == pytest.approx(result["norms"], rel=1e-5)


def test_a_step_that_it_leaves_out_is_a_record(found: dict[str, Scenario]) -> None:
    (result,) = found["skips_a_step"].results
    assert result == [[step, step != 3] for step in range(STEPS)]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (
            "before the process group",
            "model: must be a DistributedDataParallel, not Sequential; wrap it first: DistributedDataParallel(model)",
        ),
        ("two optimizers", "model: is already watched with another optimizer, and only one can be watched at a time;"),
        ("two models", "optimizer: holds 6 parameter(s) of another model; give each model its own optimizer"),
        ("no module", "model: must be a torch.nn.Module, not function"),
    ],
)
def test_what_it_cannot_watch_is_refused_in_one_line(found: dict[str, Scenario], what: str, error: str) -> None:
    (result,) = found["refusals"].results
    assert result[what].startswith(f"SettingsError: {error}")
