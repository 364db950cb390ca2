"""`attach` beside an engine of Ignite, whose step the script has written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.torch_jobs import run_scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.trainers,
    pytest.mark.skipif(find_spec("ignite") is None, reason="ignite is not installed: make test-trainers"),
]


def test_an_engine_that_accumulates_trains_as_alone_and_has_its_norms(tmp_path: Path) -> None:
    for result in run_scenarios(tmp_path, "ignite_engine.py", ["observed"])["observed"].results:
        assert result["same"] and result["dropped"] == {} and result["edited"] == [False] * 6
        assert result["global"] == pytest.approx(result["norms"], rel=1e-5)
