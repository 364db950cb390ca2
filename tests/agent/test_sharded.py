"""A model that `fully_shard` has sharded trains as with stock clipping, and has the norms that torch computes."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

EVERYWHERE = ["observed", "clipped_fused", "clipped_unfused"]
REPLICAS = ["observed_replicas", "clipped_replicas"]
CASES = [
    "clipped_by_value", "accumulated", "accumulated_and_reduced", "mixed_precision", "not_resharded", "checkpointed",
    "checkpointed_reentrant", "compiled", "after_an_evaluation", "resumed", "frozen", "scaled_fused", "scaled_unfused",
]  # fmt: skip
SCRIPTS = [
    "nan_batch", "nan_batch_skipped", "one_rank_detaches", "attached_before_a_step", "own_clipping",
    "own_clipping_scaled", "let_go", "refusals",
]  # fmt: skip
JOBS = {1: ["observed"], 2: [*EVERYWHERE, *CASES, "adaptive"], 3: EVERYWHERE, 4: [*EVERYWHERE[:2], *REPLICAS]}
"""Scenarios by the number of ranks."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return {
        f"{name} on {ranks}": scenario
        for ranks, names in JOBS.items()
        for name, scenario in run_scenarios(
            tmp_path_factory.mktemp(f"sharded{ranks}"), "sharded.py", names, ranks=ranks
        ).items()
    }


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("sharded_scripts"), "sharded_scripts.py", SCRIPTS)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """The rules with small kernels, as on a GPU, on the CPU's tensors."""
    folder = tmp_path_factory.mktemp("on_device")
    return run_scenarios(folder, "sharded.py", ["clipped_fused", "clipped_unfused"], TEST_ARITHMETIC="device")


@pytest.fixture(scope="module")
def scripts_on_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("scripts_on_device")
    return run_scenarios(folder, "sharded_scripts.py", ["own_clipping"], TEST_ARITHMETIC="device")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("sharded_faults")
    return run_scenarios(folder, "sharded_faults.py", ["everywhere"], FORESHOCK_STRICT="")["everywhere"]


@pytest.mark.parametrize(
    "name", [f"{name} on {ranks}" for ranks, names in JOBS.items() if ranks > 1 for name in names if name != "adaptive"]
)
def test_a_sharded_model_trains_as_with_stock_clipping_and_has_torchs_norms(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["dropped"] == {}
        assert result["ours"] == pytest.approx(result["norms"], rel=1e-5) and len(result["ours"]) >= 6
        if "observed" in name:
            assert result["same"]
        elif name == "clipped_by_value on 2":
            assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["coefficients"] == [1.0] * 6
        else:
            assert result["apart"] < 1e-4 and result["alike"] < 1e-6
            assert min(result["norms"]) > 0.5 and max(result["coefficients"]) < 1, "nothing was clipped"
        # No rank has a gradient of its own; each has marked its forward passes, except an evaluation's.
        assert not any(result["local"]) and not any(result["edited"])
        assert result["passes"] == (3 if "accumulated" in name else 1) * len(result["ours"])


@pytest.mark.parametrize("name", ["clipped_fused", "clipped_unfused"])
def test_a_gpus_arithmetic_gives_the_same(on_device: dict[str, Scenario], name: str) -> None:
    for result in on_device[name].results:
        assert result["dropped"] == {} and result["ours"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["losses"] == [2.0] * 20


def test_a_gpus_arithmetic_leaves_what_the_script_clips_to_it(scripts_on_device: dict[str, Scenario]) -> None:
    for result in scripts_on_device["own_clipping"].results:
        assert result["ours"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["coefficients"][0] < 1 and result["coefficients"][1:] == [1.0] * 5


def test_losses_are_summed_over_ranks_with_the_norms(found: dict[str, Scenario]) -> None:
    # A loss that the script observes after the backward pass is in no sum.
    for result in found["observed on 3"].results:
        assert result["sums"] == list(range(1, 11)) and result["losses"] == [3.0] * 10


def test_adaptive_clipping_is_the_same_on_all_ranks(found: dict[str, Scenario]) -> None:
    first, second = found["adaptive on 2"].results
    assert first["coefficients"] == second["coefficients"] and min(first["coefficients"]) < 1
    assert first["ours"] == second["ours"] and first["alike"] == second["alike"] == 0


def test_a_nan_is_found_at_its_step_and_parameter_and_no_rank_is_blamed(scripts: dict[str, Scenario]) -> None:
    for result in scripts["nan_batch"].results:
        assert [norm == "nan" for norm in result["norms"]][:5] == [False] * 3 + [True] * 2
        # The NaN came into being between the last layer and the one in the middle.
        assert result["nan"][:4] == [0, 0, 0, 4] and result["first"][3] == "1.1.bias"
        assert set(result["local"]) == {-1.0} and not any(result["ranks"])
        assert result["dropped"] == {}


def test_a_nan_step_is_skipped_on_all_ranks(scripts: dict[str, Scenario]) -> None:
    for result in scripts["nan_batch_skipped"].results:
        assert result["finite"] and result["skipped"] == [0, 0, 0, 1, 0, 0] and result["dropped"] == {}


def test_a_rank_that_has_detached_still_adds_its_shards(scripts: dict[str, Scenario]) -> None:
    first, second = scripts["one_rank_detaches"].results
    assert first["ours"] == pytest.approx(first["norms"], rel=1e-5) and len(first["ours"]) == 6
    assert second["ours"] == pytest.approx(second["norms"][:3], rel=1e-5)
    assert first["dropped"] == second["dropped"] == {}


def test_nothing_of_ours_keeps_a_sharded_model_or_its_parameters(scripts: dict[str, Scenario]) -> None:
    assert scripts["let_go"].results == [0, 0]


def test_a_gradient_from_before_attach_is_clipped(scripts: dict[str, Scenario]) -> None:
    assert all(result["apart"] < 1e-4 for result in scripts["attached_before_a_step"].results)


@pytest.mark.parametrize("name", ["own_clipping", "own_clipping_scaled"])
def test_a_scripts_own_clipping_of_shards_is_noticed_one_step_late_and_said_once(
    scripts: dict[str, Scenario], name: str
) -> None:
    scenario = scripts[name]
    for result in scenario.results:
        assert result["edited"] == [False] + [True] * 5
        # From before that clipping, which left at most 0.5; ours would have left 0.25.
        assert result["ours"] == pytest.approx(result["norms"], rel=1e-5) and min(result["norms"]) > 0.5
        assert max(result["coefficients"][1:]) == min(result["coefficients"][1:]) == 1.0
    assert scenario.lines_with("the script changes gradients between backward and step") == [1, 0]


def test_a_single_rank_has_the_norms_too(found: dict[str, Scenario]) -> None:
    (result,) = found["observed on 1"].results
    assert result["same"] and result["ours"] == pytest.approx(result["norms"], rel=1e-5)


def test_what_is_not_measured_is_said_once(found: dict[str, Scenario]) -> None:
    assert found["observed on 2"].lines_with("the model is sharded, so only global norms are measured") == [1, 0]


REFUSED = {
    "fsdp": "FullyShardedDataParallel flattens parameters, so layers cannot be measured; use fully_shard",
    "parts": "fully_shard was applied only to parts of it; apply it to the whole model too, last",
    "ignored": "has parameters that fully_shard ignores, whose gradients differ between ranks; shard or freeze them",
    "tensor parallel": "its parameters are on several device meshes; Foreshock supports one",
    "tensor parallel everywhere": "other parallelism than fully_shard places its parameters, which is not supported",
    "offloaded": "keeps its shards on the CPU, away from the mesh; use no offload_policy",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_watched_is_refused_in_one_line(scripts: dict[str, Scenario], what: str) -> None:
    for result in scripts["refusals"].results:
        assert result[what].startswith(f"SettingsError: model: {REFUSED[what]}") and "\n" not in result[what]


def test_an_optimizer_of_another_sharded_model_is_refused(scripts: dict[str, Scenario]) -> None:
    for result in scripts["refusals"].results:
        assert result["another"].startswith("SettingsError: optimizer: holds none of the model's parameters")


def test_each_call_of_a_sharded_step_may_fail_on_one_rank(failing: Scenario) -> None:
    good, bad = failing.results
    assert good["wrong"] == bad["wrong"] == []
    called = set(bad["called"])
    assert len(called) > 30 and {"ShardSums.measure", "ShardSums.prepare", "ShardedMeasure.measure"} <= called
    # Both ways of clipping, and by other means where they fail.
    assert {"OptimizerControl.divide", "Apply.apply"} <= called
