"""Triton's kernels come to what the CPU path and the collector's detector come to.

Triton's interpreter runs them on a CPU. With TRITON_INTERPRET=0 they are compiled, and run on a card.
"""

from __future__ import annotations

import math
import platform
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock._arithmetic.host import HostArithmetic
from foreshock._arithmetic.norms import NormSummary
from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._control.clip import AdaptiveClip, NormClip
from foreshock._control.decide import Decide
from foreshock._measure.rank_sums import SUM_FIELDS, FinishedSum, RankSums
from foreshock._step import Step
from foreshock_protos.columns import MEASURED_COLUMNS, MEASURED_NAMES, REDUCED_COLUMNS, REDUCED_NAMES
from foreshock_recorder.layout import HAS_LOSS, HAS_STEP, OBSERVED_PAYLOAD, device_checksum
from tests.support.kernels import DEVICE, INTERPRETED, on_device, plan_of

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has wheels for Linux on x86-64 only", allow_module_level=True)

from foreshock._kernels import chunks
from foreshock._kernels import step as kernel_step
from foreshock._kernels.launches import OBSERVED_WORDS, Measurement, OrderedSums, StepKernel
from foreshock._kernels.tables import ChunkTable, GradientSums, ParameterOrder
from tests.support import kernels_in_torch
from tests.support.kernels_in_torch import Launch

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")
HOST = HostArithmetic()
pytestmark: list[pytest.MarkDecorator] = [] if INTERPRETED else [pytest.mark.gpu]


class Kernels:
    """Measures and decides by the kernels."""

    def __init__(self, plan: ParameterPlan, order: list[int], **policy: Any) -> None:
        table = ChunkTable(plan)
        in_order = ParameterOrder(range(table.parameters), plan.numbers, DEVICE)
        self.averaged = OrderedSums(GradientSums(table), in_order)
        self.local = OrderedSums(GradientSums(table), ParameterOrder(order, plan.numbers, DEVICE))
        self.kernel = StepKernel(table.layers, DEVICE, **policy)

    def step(self, averaged: list[Tensor | None], local: list[Tensor | None] | None, **facts: Any) -> list[float]:
        """The row; whatever is not given is absent."""
        self.kernel.measure(self.averaged.sums, on_device(averaged))
        if local is not None:
            self.local.sums.measure(on_device(local))
        known: dict[str, Any] = {"sequence": 1, **facts}
        own, carried = None if local is None else self.local, known.pop("carried", None)
        self.kernel.decide(Measurement(averaged=self.averaged, local=own, carried=carried), **known)
        return self.kernel.row.tolist()


def number(value: float) -> Tensor:
    """A number of a step as the kernels take it."""
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def expected_row(
    plan: ParameterPlan,
    averaged: list[Tensor | None],
    local: list[Tensor | None] | None,
    order: list[int],
    scale: float,
) -> dict[str, Any]:
    """The columns of norms as the CPU path has them; and the layers' norms."""

    def summary(gradients: list[Tensor | None], order: list[int]) -> NormSummary:
        present = [index for index in order if gradients[index] is not None]
        norms = HOST.norms([g for index in present if (g := gradients[index]) is not None])
        return HOST.unscaled(HOST.summarize(norms, plan.layout(tuple(present))), scale)

    whole = summary(averaged, list(range(len(averaged))))
    own = None if local is None else summary(local, order)
    columns = {column.name: column.missing for column in MEASURED_COLUMNS}
    columns |= {
        "global_norm": float(whole.total),
        "global_nan_parameters": float(whole.nan_parameters),
        "global_inf_parameters": float(whole.inf_parameters),
        "first_nonfinite_global": float(whole.first_nonfinite),
    }
    if own is not None:
        columns |= {
            "local_norm": float(own.total),
            "local_nan_parameters": float(own.nan_parameters),
            "local_inf_parameters": float(own.inf_parameters),
            "first_nonfinite_local": float(own.first_nonfinite),
        }
    layers = [*whole.layers, *([0.0] * len(plan.layers) if own is None else own.layers)]
    return {"columns": columns, "layers": layers}


ELEMENTS = st.sampled_from([0.0, 1.0, -2.5, 3e4, 1e-3, NAN, INF, -INF]) | st.floats(-100, 100, width=32)
GRADIENT = st.none() | st.lists(ELEMENTS, min_size=0, max_size=4).map(torch.tensor)
SIZES = 5


@given(
    averaged=st.lists(GRADIENT, min_size=SIZES, max_size=SIZES),
    local=st.none() | st.lists(GRADIENT, min_size=SIZES, max_size=SIZES),
    order=st.permutations(range(SIZES)),
    scale=st.sampled_from([1.0, 4.0, 1024.0]),
)
@settings(max_examples=25, deadline=None)
def test_a_row_is_that_of_the_cpu_path(
    averaged: list[Tensor | None], local: list[Tensor | None] | None, order: list[int], scale: float
) -> None:
    plan = plan_of(*[4] * SIZES, layers=3)
    kernels = Kernels(plan, order, clip=NormClip(max_norm=1.0), skip=False, dry_run=False)
    # As large as the plan says, or absent.
    whole = [None if g is None else nn.functional.pad(g.float(), (0, 4 - len(g))) for g in averaged]
    own = (
        None if local is None else [None if g is None else nn.functional.pad(g.float(), (0, 4 - len(g))) for g in local]
    )
    scales = number(scale)
    sums = torch.arange(16.0, 16 + len(SUM_FIELDS), dtype=torch.float64, device=DEVICE)
    with np.errstate(all="ignore"):
        row = kernels.step(
            whole, own, sequence=7, carried=scales, loss_scale=scales, optimizer_scale=scales,
            reduced=FinishedSum(6, sums, number(2.0)), columns={"parameter_norm": number(2.5)},
        )  # fmt: skip
        expected = expected_row(plan, whole, own, order, scale)
    norm = expected["columns"]["global_norm"]
    divisor = max((norm + 1e-6) / 1.0, 1.0) if math.isfinite(norm) else 1.0
    columns = expected["columns"] | {"loss_scale": scale, "clip_coefficient": 1 / divisor, "parameter_norm": 2.5}
    # The square sum contains the loss scale, squared.
    columns |= dict(zip(REDUCED_NAMES, [6.0, 4.0, *sums.tolist()[1:]], strict=True))
    assert dict(zip(MEASURED_NAMES, row, strict=False)) == pytest.approx(columns, rel=1e-6, nan_ok=True)
    assert row[len(MEASURED_NAMES) :] == pytest.approx(expected["layers"], rel=1e-6, nan_ok=True)
    assert float(kernels.kernel.divisor) == pytest.approx(divisor * scale) and float(kernels.kernel.skips) == 0.0
    payload = kernels.kernel.row.cpu().numpy().tobytes()
    checksum, sequence = kernels.kernel.checksum.tolist()
    assert (checksum % 2**64, sequence) == (device_checksum(payload), 7)


@pytest.mark.parametrize("dry_run", [False, True])
def test_kernel_and_host_clip_and_skip_alike(dry_run: bool) -> None:
    """Adaptive clipping and skipping of 40 steps of a run that has a history already."""
    plan = plan_of(3, 2, layers=1, dtypes=[torch.float64] * 2)
    clip = AdaptiveClip(max_norm=50.0)
    kernels = Kernels(plan, [0, 1], clip=clip, skip=True, dry_run=dry_run)
    host = Decide(HOST, CPU, clip=clip, skip=True)
    assert host._history is not None
    chance = np.random.default_rng(1)
    for _ in range(30):
        host.decide(Step(sequence=1, number=0, norm=float(np.exp(chance.normal(0, 0.05))), learning_rate=0.1))
    kernels.kernel.state[: kernel_step.ACCEPTING.value + 1] = torch.tensor(host._history.state[0], dtype=torch.float64)
    clipped = skipped = 0.0
    for step in range(40):
        height = {5: 2.0, 9: 5.0, 12: NAN, 13: INF, 20: 5.0, 21: 5.0, 22: 5.0, 23: 5.0, 30: 5.0}.get(step, 0.0)
        gradient = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) * float(np.exp(height + chance.normal(0, 0.05)))
        scaler_skips, edited, rate = float(step == 20), step == 25, 0.1 if step < 35 else 1.0
        row = dict(
            zip(
                MEASURED_NAMES,
                kernels.step(
                    [gradient, None],
                    None,
                    planned=step == 35,
                    edited=edited,
                    found_inf=number(scaler_skips),
                ),
                strict=False,
            )
        )
        known = Step(
            sequence=1, number=0, norm=float(gradient.norm()), learning_rate=rate, found_inf=scaler_skips, edited=edited
        )
        host.decide(known)
        decision = known.decision
        assert decision is not None and decision.skip is not None and (decision.divisor is None) == edited
        divisor = 1.0 if decision.divisor is None else float(decision.divisor)
        bits = (divisor > 1) + 2 * bool(decision.skip)
        skips = 0.0 if dry_run else float(bool(decision.skip) or scaler_skips > 0)
        assert row["skipped"] == (scaler_skips if dry_run else skips)
        assert row["shadow"] == (bits if dry_run else 0.0)
        assert row["clip_coefficient"] == pytest.approx(1.0 if dry_run else 1 / divisor, rel=1e-12)
        assert float(kernels.kernel.divisor) == pytest.approx(1.0 if dry_run else divisor, rel=1e-6)
        assert float(kernels.kernel.skips) == (1.0 if dry_run else skips)
        clipped, skipped = clipped + (divisor > 1), skipped + bool(decision.skip)
    assert clipped >= 4 and 3 <= skipped < 9
    counts = kernels.kernel.state[[kernel_step.DRY_RUN_CLIPPED.value, kernel_step.DRY_RUN_SKIPPED.value]]
    assert counts.tolist() == ([clipped, skipped] if dry_run else [0.0, 0.0])


@pytest.mark.parametrize("loss", [None, 0.5, NAN, INF])
def test_a_ranks_part_of_the_sum_is_that_of_the_cpu_path(loss: float | None) -> None:
    plan = plan_of(3, 2)
    sums = object.__new__(RankSums)
    sums._arithmetic, sums._zero, sums._one = HOST, 0.0, 1.0
    cases: list[list[Tensor | None]] = [[torch.ones(3), torch.ones(2)], [torch.zeros(3), None]]
    for gradients in (*cases, [torch.tensor([NAN, INF, 1.0]), None]):
        kernels = Kernels(plan, [1, 0], clip=None, skip=False, dry_run=False)
        kernels.local.sums.measure(on_device(gradients))
        contribution = torch.full((len(SUM_FIELDS),), -1.0, dtype=torch.float64, device=DEVICE)
        kernels.kernel.contribute(kernels.local, None if loss is None else number(loss), contribution)
        present = [index for index in (1, 0) if gradients[index] is not None]
        norms = HOST.norms([g for index in present if (g := gradients[index]) is not None])
        summary = HOST.summarize(norms, plan.layout(tuple(present)))
        torch.testing.assert_close(contribution.cpu(), sums.contribution(summary, loss), rtol=1e-6, atol=0)


def test_the_newest_sum_over_ranks_is_in_each_record_until_another_arrives() -> None:
    kernels = Kernels(plan_of(3), [0], clip=None, skip=False, dry_run=False)
    missing = [column.missing for column in REDUCED_COLUMNS]
    sums = torch.arange(1.0, 1 + len(SUM_FIELDS), dtype=torch.float64, device=DEVICE)
    arrived = [None, FinishedSum(1, sums, None), None, FinishedSum(3, 2 * sums, None), None]
    expected = [missing, [1.0, *sums.tolist()], [1.0, *sums.tolist()], *2 * [[3.0, *(2 * sums).tolist()]]]
    for sequence, (reduced, columns) in enumerate(zip(arrived, expected, strict=True), 1):
        row = kernels.step([torch.ones(3)], None, sequence=sequence, reduced=reduced)
        assert row[len(MEASURED_NAMES) - len(REDUCED_NAMES) : len(MEASURED_NAMES)] == columns
        # The buffer is used again for a later sum.
        assert reduced is None or float(reduced.values.fill_(-1.0)[0]) == -1.0
        sums = torch.arange(1.0, 1 + len(SUM_FIELDS), dtype=torch.float64, device=DEVICE)


def test_an_optimizer_that_can_no_longer_skip_is_recorded_as_not_skipping() -> None:
    kernels = Kernels(plan_of(3), [0], clip=None, skip=True, dry_run=False)
    for can_skip in (True, False):
        row = dict(zip(MEASURED_NAMES, kernels.step([torch.full((3,), NAN)], None, can_skip=can_skip), strict=False))
        assert row["skipped"] == float(kernels.kernel.skips) == float(can_skip)
        assert row["global_nan_parameters"] == 1.0


@pytest.mark.parametrize("step_number", [None, 12])
def test_what_the_script_observed_goes_with_the_record_or_after_it(step_number: int | None) -> None:
    kernels = Kernels(plan_of(3), [0], clip=None, skip=False, dry_run=False)
    kernels.step([torch.ones(3)], None, sequence=9, loss=number(0.75), number=step_number)
    *payload, check, end, begin = kernels.kernel.words[:6].tolist()
    flags = HAS_LOSS if step_number is None else HAS_LOSS | HAS_STEP
    assert OBSERVED_PAYLOAD.unpack(struct.pack("<3q", *payload)) == (step_number or 0, 0.75, flags)
    assert (check % 2**64, end, begin) == (device_checksum(struct.pack("<3q", *payload)), 9, 9)
    words = kernels.kernel.write_observed(number(0.75), step_number, 9)
    assert words.tolist() == kernels.kernel.words[:OBSERVED_WORDS].tolist()


@pytest.mark.skipif(not INTERPRETED, reason="compares on a CPU")
@pytest.mark.parametrize("clip", [None, NormClip(max_norm=2.0), AdaptiveClip(max_norm=40.0)], ids=str)
@pytest.mark.parametrize(("skip", "dry_run"), [(False, False), (True, False), (True, True)])
def test_what_stands_for_the_kernels_in_jobs_computes_the_same(
    clip: Any, skip: bool, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(3, 2, 4, layers=2, dtypes=[torch.float32, torch.bfloat16, torch.float64])
    kernels, theirs = (Kernels(plan, [2, 0, 1], clip=clip, skip=skip, dry_run=dry_run) for _ in range(2))
    sums = torch.arange(16.0, 16 + len(SUM_FIELDS), dtype=torch.float64)
    for sequence, value in enumerate([1.0, 30.0, NAN, 2.0, INF, 1e30, 3.0], 1):
        averaged = [torch.full((3,), value), torch.ones(2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float64)]
        own = [averaged[0] * 2, None, averaged[2]] if sequence != 4 else None
        facts: dict[str, Any] = {
            "sequence": sequence, "planned": sequence == 3, "edited": sequence == 4, "can_skip": sequence != 5,
            "carried": number(4.0), "loss_scale": number(2.0), "optimizer_scale": number(4.0),
            "found_inf": number(float(sequence == 6)), "loss": number(value), "number": sequence,
            "reduced": FinishedSum(sequence - 1, sums, number(2.0)) if sequence == 2 else None,
            "columns": {"parameter_norm": number(2.5)} if sequence == 3 else {},
        }  # fmt: skip
        rows, parts = [], []
        for each, path in ((kernels, ""), (theirs, "torch")):
            with monkeypatch.context() as replaced:
                if path:
                    for module, name in ((chunks, "measure_chunks"), (kernel_step, "contribute"),
                                         (kernel_step, "finish_step")):  # fmt: skip
                        replaced.setattr(module, name, Launch(getattr(kernels_in_torch, name)))
                rows.append(each.step([*averaged], own, **facts))
                part = torch.zeros(len(SUM_FIELDS), dtype=torch.float64)
                each.kernel.contribute(each.averaged, facts["loss"], part)
                parts.append(part)
        assert rows[0] == pytest.approx(rows[1], rel=1e-6, nan_ok=True)
        torch.testing.assert_close(parts[0], parts[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(kernels.kernel.state, theirs.kernel.state, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(kernels.kernel._decision, theirs.kernel._decision, rtol=1e-6, atol=0)
        assert torch.equal(kernels.kernel.words[:6], theirs.kernel.words[:6])


def test_a_second_record_of_one_measurement_has_its_own_checksum() -> None:
    kernels = Kernels(plan_of(3), [0], clip=None, skip=False, dry_run=False)
    row = kernels.step([torch.ones(3)], None, sequence=1)
    kernels.kernel.decide(Measurement(averaged=kernels.averaged), sequence=2)
    assert kernels.kernel.row.tolist() == row
    payload = kernels.kernel.row.cpu().numpy().tobytes()
    checksum, sequence = kernels.kernel.checksum.tolist()
    assert (checksum % 2**64, sequence) == (device_checksum(payload), 2)
