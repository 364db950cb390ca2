"""Every row of docs/composition.md: what DDP scripts do goes together with Foreshock, or is refused in one line."""

from __future__ import annotations

import re

import pytest

from tests.support.repository import ROOT
from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = pytest.mark.integration

OWN_HOOK = ["fp16_compression", "bf16_compression", "power_sgd", "hook_of_their_own"]
UNEVEN = ["uneven_inputs", "uneven_inputs_divided_by_those_left"]
LIKE_STOCK = [
    "compiled", "compiled_step", "ignored_fused", "ignored_unfused", "frozen_and_shared", *UNEVEN, "static_graph",
    "uneven_inputs_in_views",
]  # fmt: skip
BY_BUCKET = ["static_graph", "uneven_inputs_in_views"]
WITHOUT_LOCAL = [
    "fp16_compression_in_views", "bf16_compression_in_views", "power_sgd_in_views", "hook_of_their_own_in_views",
    "uneven_inputs_divided_by_those_left_in_views",
]  # fmt: skip
WRAPPED = ["fp16_compression_wrapped", "bf16_compression_wrapped", "power_sgd_wrapped", "hook_of_their_own_wrapped"]
IN_VAIN = "fp16_compression_wrapped_in_vain"
OTHERS = ["later_step_hook", "several_optimizers", "detached_and_attached_again", "detached", "refusals"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("composition")
    return run_scenarios(folder, "composition.py", [*LIKE_STOCK, *WITHOUT_LOCAL, *OWN_HOOK, *WRAPPED, IN_VAIN, *OTHERS])


@pytest.mark.parametrize("name", [*LIKE_STOCK, *WITHOUT_LOCAL])
def test_training_is_that_of_stock_clipping_and_norms_are_its_norms(found: dict[str, Scenario], name: str) -> None:
    for result in found[name].results:
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["dropped"] == {}
        # A rank that has run out of inputs makes no steps, and has no records of them.
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5) and len(result["norms"]) >= 6
        assert min(result["norms"]) > 0.5, "nothing was clipped"
        assert result["measures local"] == (name in LIKE_STOCK)
        assert all((norm > 0) == (name in LIKE_STOCK) for norm in result["local"])
        # No communication hook but where local norms need it; within join, no sums but from that hook.
        assert result["hooked"] == (name in BY_BUCKET or name in WITHOUT_LOCAL[:4])
        assert any(sequence > 0 for sequence in result["sums"]) == (name in set(LIKE_STOCK) - set(UNEVEN))


@pytest.mark.parametrize("name", WITHOUT_LOCAL[:4])
def test_a_hook_of_the_scripts_own_in_bucket_views_is_said_once_to_prevent_local_norms(
    found: dict[str, Scenario], name: str
) -> None:
    assert found[name].lines_with("already has a communication hook, so only global norms are measured") == [1, 0]


@pytest.mark.parametrize("name", [*OWN_HOOK, IN_VAIN, *WRAPPED])
def test_a_scripts_own_hook_reduces_as_alone_and_local_norms_are_those_before_it(
    found: dict[str, Scenario], name: str
) -> None:
    # Beside the same hook without local norms.
    bare = name.removesuffix("_in_vain").removesuffix("_wrapped")
    for result, alone in zip(found[name].results, found[f"{bare}_in_views"].results, strict=True):
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
        assert result["global"] == alone["global"] and min(result["norms"]) > 0.5
        assert result["measures local"] and len(result["local"]) == len(result["norms"])
        # Exact, where half precision would be off by 1e-4 and more, and where "half" halves what it has averaged.
        assert result["local"][0] == pytest.approx(result["own norm"], rel=1e-6)
        assert all(norm > 0 for norm in result["local"])
    assert not any("communication hook" in line for lines in found[name].said for line in lines)


def test_a_step_hook_registered_after_attach_has_the_last_word_and_is_told_of_once(found: dict[str, Scenario]) -> None:
    for result in found["later_step_hook"].results:
        assert result["apart"] < 1e-4
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
    assert found["later_step_hook"].lines_with("another step pre-hook was registered after attach") == [1, 0]


def test_one_of_several_optimizers_is_watched_and_a_second_one_refused(found: dict[str, Scenario]) -> None:
    for result in found["several_optimizers"].results:
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and all(norm > 0 for norm in result["local"])
        assert result["second"].startswith(
            "SettingsError: model: is already watched with another optimizer, and only one can be watched at a time;"
        )


def test_a_watch_ends_and_another_begins(found: dict[str, Scenario]) -> None:
    for result in found["detached_and_attached_again"].results:
        assert result["apart"] < 1e-4 and result["counts"] == [2, 4]
    assert all(result["as stock"] for result in found["detached"].results)


REFUSED = {
    "fsdp": "SettingsError: model: FullyShardedDataParallel flattens parameters, so layers cannot be measured;",
    "zero": "SettingsError: optimizer: ZeroRedundancyOptimizer ignores hooks; use a plain optimizer",
    "sparse": "SettingsError: model: has an embedding with sparse gradients",
    "complex": "SettingsError: model: has complex parameters, whose gradients are not measured",
    "two models": "SettingsError: optimizer: holds 6 parameter(s) of another model, whose gradients this DDP model",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_watched_is_refused_in_one_line_and_nothing_is_hooked(
    found: dict[str, Scenario], what: str
) -> None:
    for result in found["refusals"].results:
        assert result[what].startswith(REFUSED[what]) and "\n" not in result[what] and result["hooks"] == 0


def test_every_test_that_the_table_names_exists() -> None:
    table = (ROOT / "docs" / "composition.md").read_text()
    named = re.findall(r"`(test_\w+)(?:\[(\w+)\])?`", table)
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    known = {name for text in sources for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) >= 20
    for test, case in named:
        assert test in known
        assert not case or any(f'"{case}"' in text for text in sources), case
