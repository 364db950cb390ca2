"""Random models, bucket sizes, accumulation, dtypes and policies, beside a reference in float64 on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torch_jobs import run_scenarios

pytestmark = pytest.mark.integration


def test_random_trainings_are_measured_and_clipped_as_a_reference_in_float64_says(tmp_path: Path) -> None:
    results = run_scenarios(tmp_path, "random_trainings.py", ["random_trainings"])["random_trainings"].results
    for result in results:
        assert result["wrong"] == ""
        assert result["seen"] >= 50
        assert result["policies"] == ["adaptive", "loose norm", "none", "norm", "value"]
        assert result["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float64"]
