"""Ranks attach together or not at all; a mistake is one clear error; training is right in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.torch_jobs import Job, Scenario, run_scenarios

pytestmark = pytest.mark.integration

SCRIPT = "attach.py"
NAMES = [
    "another_clip_on_rank_1", "no_local_norms_on_rank_1",
    "model_is_not_ddp_anywhere", "model_is_not_ddp_on_rank_0", "model_is_not_ddp_on_rank_1",
    "optimizer_of_another_model", "optimizer_is_none", "negative_max_norm", "sparse_gradients", "attached_twice",
    "bad_collector_on_rank_1", "bad_collector_variable",
    "disabled_on_rank_1", "disabled_on_rank_0", "disabled_with_wrong_arguments",
    "no_room_for_a_ring_on_rank_0", "no_room_for_a_ring_on_rank_1", "own_hook", "builtin_hook",
    "own_hook_in_views", "builtin_hook_in_views", "the_stores_timeout",
    "misspelled_variable",
    "resumed_and_told_before_the_step", "resumed_and_told_after_the_step", "resumed_and_told_once",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    # A rank that waits for another to attach waits an hour: that would be seen.
    return run_scenarios(tmp_path_factory.mktemp("attach"), SCRIPT, NAMES, FORESHOCK_ATTACH_TIMEOUT="3600")


def nobody_watches(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["hooks"] == 0 and True not in result["enabled"] and result["as stock"]


def test_a_misspelled_variable_is_told_once_and_everybody_watches(found: dict[str, Scenario]) -> None:
    line = "FORESHOCK_COLECTOR is not a Foreshock variable and is ignored; did you mean FORESHOCK_COLLECTOR?"
    scenario = found["misspelled_variable"]
    assert scenario.results == [[True, True]] * 2
    assert [lines.count(f"foreshock: {line}") for lines in scenario.said] == [1, 0]


def not_watching(scenario: Scenario) -> list[list[str]]:
    return [[line for line in lines if "not watching" in line] for lines in scenario.said]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("another_clip_on_rank_1", "clip differs: none on rank 0, norm 2 on rank 1"),
        ("no_local_norms_on_rank_1", "local_norms differs: True on rank 0, False on rank 1"),
    ],
)
def test_ranks_that_differ_in_a_setting_all_raise_it(found: dict[str, Scenario], name: str, error: str) -> None:
    results = found[name].results
    nobody_watches(results)
    for result in results:
        assert result["error"] == f"AttachError: {error}; it must be the same on every rank"


MISTAKES = [
    ("model_is_not_ddp_anywhere", {0, 1}, "model: must be a DistributedDataParallel, not Linear; wrap it first"),
    ("model_is_not_ddp_on_rank_0", {0}, "model: must be a DistributedDataParallel, not Linear; wrap it first"),
    ("model_is_not_ddp_on_rank_1", {1}, "model: must be a DistributedDataParallel, not Linear; wrap it first"),
    ("optimizer_of_another_model", {0}, "optimizer: holds none of the model's parameters; create it from model.param"),
    ("optimizer_is_none", {0, 1}, "optimizer: must be a torch.optim.Optimizer, not generator"),
    ("negative_max_norm", {0, 1}, "clip: max_norm must be a positive number, not -1.0; clip=None only observes"),
    ("sparse_gradients", {0, 1}, "model: has an embedding with sparse gradients"),
    ("bad_collector_on_rank_1", {1}, "collector: 'http://monitor:4327' is not an address; write host:port"),
    ("bad_collector_variable", {0, 1}, "FORESHOCK_COLLECTOR: 'monitor' is not an address; write host:port"),
]


@pytest.mark.parametrize(("name", "mistaken", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_argument_raises_where_it_is_and_disables_the_rest(
    found: dict[str, Scenario], name: str, mistaken: set[int], message: str
) -> None:
    scenario = found[name]
    nobody_watches(scenario.results)
    for rank, result in enumerate(scenario.results):
        if rank in mistaken:
            assert result["error"].startswith(f"SettingsError: {message}")
        else:
            assert result["error"] is None and result["enabled"] == [False]
    lines = not_watching(scenario)[0]
    assert len(lines) == (0 not in mistaken), "the error of rank 0 says it"
    assert all(f"attach failed on rank 1: {message}" in line for line in lines)


def test_an_optimizer_is_watched_once_at_a_time(found: dict[str, Scenario]) -> None:
    for result in found["attached_twice"].results:
        assert result["again"] == "SettingsError: optimizer: is already watched; detach that watch first"
        assert result["after detach"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_kill_switch_on_one_rank_disables_all_with_one_line(found: dict[str, Scenario], rank: int) -> None:
    scenario = found[f"disabled_on_rank_{rank}"]
    nobody_watches(scenario.results)
    assert [result["error"] for result in scenario.results] == [None, None]
    assert scenario.said == [[f"foreshock: not watching: FORESHOCK_DISABLED is set on rank {rank}"], []]


def test_the_kill_switch_turns_off_a_mistake_too(found: dict[str, Scenario]) -> None:
    scenario = found["disabled_with_wrong_arguments"]
    nobody_watches(scenario.results)
    assert [result["error"] for result in scenario.results] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_for_a_ring_on_one_machine_disables_all_and_training_goes_on(
    found: dict[str, Scenario], rank: int
) -> None:
    scenario = found[f"no_room_for_a_ring_on_rank_{rank}"]
    nobody_watches(scenario.results)
    assert [result["error"] for result in scenario.results] == [None, None]
    assert scenario.results[1 - rank]["rings"] == 0
    assert [result["said"] for result in scenario.results] == ([[], ["DETACHED"]] if rank == 0 else [["DETACHED"], []])
    ((line,), others) = not_watching(scenario)
    assert f"attach failed on rank {rank}: " in line and "Error" in line and not others


@pytest.mark.parametrize("name", ["own_hook", "builtin_hook"])
def test_a_script_with_a_hook_of_its_own_keeps_it_and_has_both_norms(found: dict[str, Scenario], name: str) -> None:
    scenario = found[name]
    for result in scenario.results:
        assert result["as alone"] and result["dropped"] == {}
        assert all(norm > 0 for norm in result["global"]) and all(norm > 0 for norm in result["local"])
    assert scenario.lines_with("communication hook") == [0, 0]


@pytest.mark.parametrize("name", ["own_hook_in_views", "builtin_hook_in_views"])
def test_a_hook_of_its_own_beside_bucket_views_leaves_global_norms_alone(found: dict[str, Scenario], name: str) -> None:
    scenario = found[name]
    for result in scenario.results:
        assert result["as alone"] and result["dropped"] == {}
        assert all(norm > 0 for norm in result["global"]) and set(result["local"]) == {0.0}
    assert sum("already has a communication hook" in line for line in scenario.said[0]) == 1


def test_attaching_leaves_the_time_out_of_the_jobs_store_alone(found: dict[str, Scenario]) -> None:
    assert found["the_stores_timeout"].results == [[True, True]] * 2


@pytest.mark.parametrize("how", ["told_before_the_step", "told_after_the_step", "told_once"])
def test_a_resumed_run_goes_on_where_the_script_says(found: dict[str, Scenario], how: str) -> None:
    assert found[f"resumed_and_{how}"].results == [list(range(12_000, 12_006))] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_attaches_alone_hears_who_is_missing_and_training_goes_on(tmp_path: Path, rank: int) -> None:
    name = f"only_rank_{rank}"
    results = run_scenarios(tmp_path, SCRIPT, [name], FORESHOCK_ATTACH_TIMEOUT="1")[name].results
    assert results[rank]["error"] == (
        f"AttachError: rank {1 - rank} did not call foreshock.attach within 1 s; call it on every rank"
    )
    assert results[1 - rank]["error"] is None
    assert all(result["as stock"] for result in results)


def test_a_job_that_attaches_on_rank_0_alone_ends_with_the_reason(tmp_path: Path, job: Job) -> None:
    done = job(SCRIPT, str(tmp_path), "only_rank_0_and_nobody_catches_it", FORESHOCK_ATTACH_TIMEOUT="1")
    assert done.returncode != 0
    assert "AttachError: rank 1 did not call foreshock.attach within 1 s; call it on every rank" in done.stderr
