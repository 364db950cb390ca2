"""A script that calls `clip_grad_norm_` to log the norm, and changes nothing by it, is clipped by Foreshock."""

from __future__ import annotations

import pytest

from tests.support.torch_jobs import PATHS, Scenario, run_scenarios

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    names = ["fused", "unfused", "scaled", "every_third", "clips_late"]
    return run_scenarios(tmp_path_factory.mktemp("logged"), "logged_norms.py", names, TEST_ARITHMETIC=path)


@pytest.mark.parametrize(
    ("name", "edited"),
    [
        ("fused", [False] * 6),
        ("unfused", [False] * 6),
        ("scaled", [False] * 6),
        # The first call has no norm to be compared with.
        ("every_third", [False, False, True, False, False, False]),
        # From its first edit on, the script is taken at its word.
        ("clips_late", [False, False, False, True, True, True]),
    ],
)
def test_a_clipping_call_that_changes_nothing_leaves_clipping_to_foreshock(
    found: dict[str, Scenario], path: str, name: str, edited: list[bool]
) -> None:
    for result in found[name].results:
        assert result["dropped"] == {} and result["global"] == pytest.approx(result["norms"], rel=1e-5)
        if path == "host":
            expected = [1.0 if e else 0.3 / norm for e, norm in zip(edited, result["norms"], strict=True)]
            assert result["edited"] == edited and result["coefficient"] == pytest.approx(expected, rel=1e-5)
            if True not in edited:
                assert result["apart"] < 1e-4
        else:
            # On a device the norm would come too late: there, the call counts as an edit.
            first = edited.index(True) if name == "every_third" else 0
            assert result["edited"][first] and result["coefficient"][first] == 1.0
    logged = path != "host" or name == "clips_late"
    assert found[name].lines_with("changes gradients between backward and step") == [int(logged), 0]
