"""Kernels are compiled and tried before the first step; where that fails, a rank decides by tensor operations."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foreshock._control.clip import AdaptiveClip, ValueClip
from foreshock._kernels import choice
from foreshock._kernels.choice import step_kernel, wants_kernel, why_not
from tests.support.kernels import DEVICE, INTERPRETED, plan_of
from tests.support.repository import ROOT
from tests.support.waiting import PATIENCE

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has wheels for Linux on x86-64 only", allow_module_level=True)

from foreshock._kernels.launches import StepKernel

JOB_SECONDS = 200 * PATIENCE
pytestmark: list[pytest.MarkDecorator] = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.integration
def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    script = ROOT / "tests/agent/scenarios/compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = {line.partition(" ")[0] for line in done.stdout.splitlines()}
    assert compiled == {"measure_chunks", "finish_step", "contribute", "write_observed"}


def test_kernels_that_have_been_tried_start_from_nothing() -> None:
    plan = plan_of(3, 2)
    kernel = step_kernel(plan, clip=AdaptiveClip(), skip=True, dry_run=False)
    fresh = StepKernel(len(plan.layers), DEVICE, clip=AdaptiveClip(), skip=True, dry_run=False)
    assert torch.equal(kernel.state, fresh.state) and kernel.turn == fresh.turn == 0


def test_kernels_are_for_cuda_and_for_gradients_that_show_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(3)
    assert wants_kernel(plan, clip=None, by_bucket=False) == (DEVICE.type == "cuda")
    monkeypatch.setattr(choice, "DEVICES", frozenset({"cpu", "cuda"}))
    assert wants_kernel(plan, clip=AdaptiveClip(), by_bucket=False)
    assert not wants_kernel(plan, clip=AdaptiveClip(), by_bucket=True)
    assert not wants_kernel(plan, clip=ValueClip(clip_value=1.0), by_bucket=False)


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_never_reads_the_memory_of_a_card() -> None:
    plan = plan_of(3)
    on_card = replace(plan, parameters=tuple(nn.Parameter(p.to("meta")) for p in plan.parameters))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        step_kernel(on_card, clip=None, skip=False, dry_run=False)


def test_an_error_of_triton_is_a_part_of_a_line() -> None:
    assert why_not(RuntimeError("Failed to find\nC compiler")) == "RuntimeError: Failed to find C compiler"
    assert len(why_not(ValueError("x" * 1000))) == 200
