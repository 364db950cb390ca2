"""The GPU benchmark: its arithmetic, and the whole of it on a CPU, with models of a few thousand parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_step
from benchmarks.gpu_models import LAYERS, MODELS, Gpt, width_of
from benchmarks.gpu_profile import Profile, summarize
from tests.support.repository import ROOT
from tests.support.waiting import PATIENCE

JOB_SECONDS = 200 * PATIENCE
PROFILE = Profile(launches=90.0, copies=2.0, waits=0.0, device_us=900.0)


def event(name: str, *, device: bool = False, us: float = 0.0, annotation: bool = False) -> Any:
    kind = SimpleNamespace(name="CUDA" if device else "CPU")
    return SimpleNamespace(name=name, device_type=kind, device_time_total=us, is_user_annotation=annotation)


def test_a_profile_counts_what_the_host_launches_and_what_the_device_runs() -> None:
    events = [
        event("aten::add"),
        event("cudaLaunchKernel"),
        event("cuLaunchKernelEx"),
        event("cudaMemcpyAsync"),
        event("cudaStreamSynchronize"),
        # The benchmark's own.
        event("cudaDeviceSynchronize"),
        event("void at::native::vectorized_elementwise_kernel", device=True, us=5.0),
        event("Memcpy DtoH (Device -> Pinned)", device=True, us=2.0),
        event("Memset (Device)", device=True, us=1.0),
        # Ranges around kernels that are counted already.
        event("nccl:all_reduce", device=True, us=7.0),
        event("Optimizer.step#AdamW.step", device=True, us=7.0),
        event("a range of somebody's", device=True, us=7.0, annotation=True),
    ]
    assert summarize(events, 2) == Profile(launches=1.0, copies=1.0, waits=0.5, device_us=4.0)


def test_a_variant_is_compared_with_stock_clipping_round_by_round() -> None:
    whole = {"stock_clip": [1.0, 2.0, 4.0], "plain": [0.5, 1.0, 2.0], "observe": [1.5, 3.0, 2.0]}
    profiles = dict.fromkeys(("stock_clip", "plain"), PROFILE)
    profiles["observe"] = Profile(launches=100.0, copies=4.0, waits=0.0, device_us=1900.0)
    rows = {
        row.variant: row
        for row in gpu_step.results_of(
            whole, whole, profiles, model="mlp_1m", parameters=1_000_000, buckets="views", copy_bytes_per_second=4e9
        )
    }
    assert [rows[name].ratio_to_stock_clip for name in whole] == [1.0, 0.5, 1.5]
    assert (rows["plain"].ratio_low, rows["plain"].ratio_high) == (0.5, 0.5)
    assert rows["observe"].ratio_low == 0.5 and rows["observe"].ratio_high == 1.5
    assert (rows["observe"].step_ms, rows["observe"].host_ms, rows["observe"].rounds) == (2000.0, 2000.0, 3)
    # A millisecond at 4 GB/s is 4 MB: as much as the gradients have.
    assert rows["observe"].gradient_passes == pytest.approx(1.0) and rows["plain"].gradient_passes == 0.0


def test_an_interval_of_many_rounds_is_narrow_and_holds_the_median() -> None:
    low, high = gpu_step.interval([1.0 + number / 1000 for number in range(101)])
    assert 1.03 < low < 1.05 < high < 1.07


def test_short_steps_are_timed_many_at_a_time() -> None:
    assert [gpu_step.steps_per_visit(seconds) for seconds in (1e-5, 0.01, 0.2)] == [20, 3, 1]


def test_variants_that_do_not_fit_together_are_measured_beside_the_same_two() -> None:
    names = ["a", "plain", "b", "stock_clip", "c"]
    assert list(gpu_step.groups(names, 9)) == [["plain", "stock_clip", "a", "b", "c"]]
    assert list(gpu_step.groups(names, 4)) == [["plain", "stock_clip", "a", "b"], ["plain", "stock_clip", "c"]]
    assert list(gpu_step.groups(["stock_clip"], 0)) == [["stock_clip"]]
    # 400 M parameters on a card of 80 GB.
    assert gpu_step.models_that_fit(400_000_000, 78e9) == 7


def test_models_have_the_sizes_of_their_names() -> None:
    sizes = {"mlp_1m": 1e6, "mlp_25m": 25e6, "mlp_100m": 100e6, "mlp_400m": 400e6, "gpt_124m": 124e6}
    found = {name: model.parameter_count() for name, model in MODELS.items()}
    assert found == {name: pytest.approx(size, rel=0.07) for name, size in sizes.items()}
    assert width_of(400) ** 2 * LAYERS == pytest.approx(400e6, rel=0.02)


def test_the_gpt_predicts_each_token_from_those_before_it() -> None:
    torch.manual_seed(0)
    model = Gpt(vocabulary=11, width=8, blocks=2, heads=2, context=6)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]])
    first, second = model(tokens)
    assert first.shape == (6, 11)
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:])


def test_a_table_has_a_block_for_each_model_and_kind_of_bucket() -> None:
    whole = {"stock_clip": [1.0, 2.0], "plain": [0.5, 1.0]}
    rows = []
    for buckets, profiles in (("copies", {}), ("views", dict.fromkeys(whole, PROFILE))):
        found = gpu_step.results_of(
            whole, whole, profiles, model="mlp_1m", parameters=1_000_000, buckets=buckets, copy_bytes_per_second=None
        )
        rows += [asdict(row) for row in found]
    lines = gpu.table(rows).splitlines()
    assert lines[0] == "### mlp_1m: 1.0 M parameters, gradients as copies of the buckets"
    assert lines[7] == "### mlp_1m: 1.0 M parameters, gradients as views of the buckets"
    assert lines[5] == "| `plain` | 0.500 (0.500 to 0.500) | 750.000 | 750.000 (500.000 to 1000.000) |  |  |  |  |  |"
    assert lines[12].endswith("| 90.0 | 2.0 | 0.0 | 0.900 |  |")
    assert {line.count("|") for line in lines if line.startswith("|")} == {10}


def test_stock_clipping_cannot_be_left_out() -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--variants", "plain"])


@pytest.mark.integration
def test_the_whole_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--device", "cpu", "--no-tests", "--models", "mlp_1m", "--buckets", "views", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options, "--output", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=JOB_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["errors"] == [] and results["tests"] is None and results["machine"]["device"] == "cpu"
    found = [(row["buckets"], row["variant"]) for row in results["rows"]]
    assert found == [("views", variant) for variant in gpu_step.VARIANTS]
    assert all(row["ratio_to_stock_clip"] > 0 and row["profile"] is None for row in results["rows"])
    assert (tmp_path / "gpu.md").read_text() == gpu.table(results["rows"])
