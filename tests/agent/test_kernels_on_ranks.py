"""Steps are decided by Triton's kernels on every rank or on none."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.torch_jobs import Scenario, run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux on x86-64 only"),
]

WITH = ["with_kernels", "bucket_views_without_local_norms"]
WITHOUT = ["one_rank_without", "value_clip", "bucket_views", "on_a_cpu"]
COMPOSED = ["ignored_fused", "ignored_unfused", "frozen_and_shared", "uneven_inputs", "power_sgd"]
CHANGED = ["unfused_checkpoint", "joins_fused", "leaves", "freezes_and_unfreezes", "moves"]
LIKE_STOCK = [*COMPOSED, *CHANGED]
LINE = "Triton's kernels do not run on rank 1: RuntimeError: Failed to find C compiler; each step launches more"


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """Rows of docs/composition.md."""
    folders = [tmp_path_factory.mktemp(name) for name in ("composition", "changes")]
    found = run_scenarios(folders[0], "composition.py", COMPOSED, TEST_ARITHMETIC="kernels")
    return found | run_scenarios(folders[1], "changes.py", CHANGED, TEST_ARITHMETIC="kernels")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return run_scenarios(tmp_path_factory.mktemp("kernel_choice"), "kernel_choice.py", [*WITH, *WITHOUT])


@pytest.mark.parametrize("name", LIKE_STOCK)
def test_what_else_a_script_does_goes_together_with_kernels(name: str, composed: dict[str, Scenario]) -> None:
    for result in composed[name].results:
        assert result["apart"] < 1e-4 and result["dropped"] == {}
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5) and len(result["norms"]) >= 6
        assert min(result["norms"]) > 0.5, "nothing was clipped"
        assert all(norm > 0 for norm in result["local"])


@pytest.mark.parametrize("name", [*WITH, *WITHOUT])
def test_all_ranks_use_kernels_or_none_does_and_training_is_that_of_stock_clipping(
    found: dict[str, Scenario], name: str
) -> None:
    for result in found[name].results:
        assert result["kernels"] == (name in WITH)
        assert result["apart"] < 1e-4 and result["alike"] < 1e-6 and result["dropped"] == {}
        assert all(result["losses"]) and all(norm > 0 for norm in result["global"])
        assert all((norm > 0) == (name != "bucket_views_without_local_norms") for norm in result["local"])
    assert len({tuple(result["global"]) for result in found[name].results}) == 1, "ranks decide by the same norm"


def test_a_rank_whose_kernels_do_not_run_is_named_once(found: dict[str, Scenario]) -> None:
    assert found["one_rank_without"].lines_with(LINE) == [1, 0]
    for name in (*WITH, "value_clip", "bucket_views", "on_a_cpu"):
        assert found[name].lines_with("Triton") == [0, 0]
