"""Whether a rank decides by Triton's kernels or by tensor operations, which come to the same with more launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._control.clip import Clip, ValueClip

if TYPE_CHECKING:
    from foreshock._kernels.launches import StepKernel

DEVICES = frozenset({"cuda"})
"""Kinds of device whose steps are decided by kernels. Tests add the CPU, where Triton's interpreter runs them."""


def wants_kernel(plan: ParameterPlan, *, clip: Clip | None, by_bucket: bool) -> bool:
    """Return whether kernels would decide, where they run. The same on every rank.

    Value clipping changes elements one by one, and a communication hook shows gradients bucket by bucket: both are left
    to tensor operations.
    """
    return plan.device().type in DEVICES and not isinstance(clip, ValueClip) and not by_bucket


def step_kernel(plan: ParameterPlan, *, clip: Clip | None, skip: bool, dry_run: bool) -> StepKernel:
    """Return the kernels for a plan, compiled and tried. Raises whatever Triton raises where it cannot run them.

    Triton comes with torch's CUDA builds, and needs a C compiler for what launches a kernel.
    """
    from triton import JITFunction

    from foreshock._kernels.chunks import measure_chunks
    from foreshock._kernels.launches import OrderedSums, StepKernel
    from foreshock._kernels.tables import ChunkTable, GradientSums, ParameterOrder

    assert not isinstance(clip, ValueClip)
    if plan.device().type != "cpu" and not isinstance(measure_chunks, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, and Triton's interpreter reads no memory of a card")
    kernel = StepKernel(len(plan.layers), plan.device(), clip=clip, skip=skip, dry_run=dry_run)
    order = ParameterOrder(range(len(plan.parameters)), plan.numbers, plan.device())
    kernel.compile(OrderedSums(GradientSums(ChunkTable(plan)), order))
    return kernel


def why_not(error: Exception) -> str:
    """Return an error of Triton's as a part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
