"""What Triton's kernels compute, without Triton: its interpreter takes a hundred times as long for a step.

The rules are those of the host. tests/gpu/test_kernels.py compares these functions with the kernels.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from foreshock._arithmetic.host import HostArithmetic
from foreshock._arithmetic.norms import NormSummary
from foreshock._control.clip import AdaptiveClip, Clip, NormClip
from foreshock._control.decide import BudgetState, Decide, Memory
from foreshock._control.history import Rates
from foreshock._kernels import chunks, tables
from foreshock._kernels import step as kernels
from foreshock._measure.rank_sums import RankSums
from foreshock._step import Step
from foreshock_protos.columns import MEASURED_NAMES, REDUCED_NAMES
from foreshock_recorder.layout import HAS_LOSS, OBSERVED_PAYLOAD, device_checksum

HOST, CPU = HostArithmetic(), torch.device("cpu")
DTYPES = {kind: dtype for dtype, kind in tables.KINDS.items()}


class Launch:
    """Takes the place of a kernel: `kernel[grid](...)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, _: tuple[int]) -> Callable[..., None]:
        return self._run

    def _run(self, *arguments: object, **options: object) -> None:
        options.pop("num_warps", None)
        # A card calls nothing of the probe's.
        profile = sys.getprofile()
        sys.setprofile(None)
        self._function(*arguments, **options)
        sys.setprofile(profile)


def gradient_at(address: int, size: int, dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=size)


def measure_chunks(
    addresses: Tensor, kinds: Tensor, sizes: Tensor, chunk_parameter: Tensor, chunk_begin: Tensor, measurement: int,
    squares: Tensor, statuses: Tensor, checksum: Tensor, *, KIND: int, BLOCK: int, CHUNK: int,
) -> None:  # fmt: skip
    checksum.zero_()
    for chunk, (parameter, begin) in enumerate(zip(chunk_parameter.tolist(), chunk_begin.tolist(), strict=True)):
        address, size = int(addresses[parameter]), min(CHUNK, int(sizes[parameter]) - begin)
        total = 0.0
        if address and size > 0:
            dtype = DTYPES[int(kinds[parameter])]
            total = float(gradient_at(address + begin * dtype.itemsize, size, dtype).double().square().sum())
        squares[chunk] = total
        status = chunks.HAS_NAN.value if math.isnan(total) else chunks.HAS_INF.value if math.isinf(total) else 0
        if status:
            statuses[parameter] = max(int(statuses[parameter]), measurement * chunks.STATUSES.value + status)


def summary_of(
    squares: Tensor, statuses: Tensor, measurement: int, positions: Tensor, numbers: Tensor | None, scale: float
) -> NormSummary:
    """Of all gradients; its layers are left out."""
    found = (statuses - measurement * chunks.STATUSES.value).tolist()
    bad = [place for place, status in zip(positions.tolist(), found, strict=True) if status > 0]
    return NormSummary(
        total=math.sqrt(float(squares.sum())) / scale,
        nan_parameters=float(found.count(chunks.HAS_NAN.value)),
        inf_parameters=float(found.count(chunks.HAS_INF.value)),
        first_nonfinite=float(numbers[min(bad)]) if bad and numbers is not None else -1.0,
        layers=[],
    )


def contribute(
    squares: Tensor, _: int, statuses: Tensor, measurement: int, positions: Tensor, __: int, loss: Tensor,
    has_loss: int, contribution: Tensor, *, BLOCK: int,
) -> None:  # fmt: skip
    sums = object.__new__(RankSums)
    sums._arithmetic, sums._zero, sums._one = HOST, 0.0, 1.0
    summary = summary_of(squares, statuses, measurement, positions, None, 1.0)
    contribution.copy_(sums.contribution(summary, float(loss) if has_loss else None))


def write_observed(words: Tensor, loss: Tensor, number: int, flags: int, sequence: int) -> None:
    payload = OBSERVED_PAYLOAD.pack(number, float(loss), flags)
    words[:5] = torch.tensor([*memoryview(payload).cast("q"), signed(device_checksum(payload)), sequence])


def signed(word: int) -> int:
    return word - (word >> 63 << 64)


def decide(
    state: Tensor, norm: float, found_inf: float, facts: int, turn: int, *, CLIP: int, SKIP: bool
) -> tuple[float, bool]:
    """Divisor, and whether the step is skipped. state: as `finish_step` has it, updated."""
    limit = float(state[kernels.LIMIT.value])
    kinds: dict[int, Callable[[], Clip | None]] = {
        kernels.NO_CLIP.value: lambda: None,
        kernels.NORM_CLIP.value: lambda: NormClip(max_norm=limit),
        kernels.ADAPTIVE_CLIP.value: lambda: AdaptiveClip(max_norm=None if math.isinf(limit) else limit),
    }
    rules = Decide(HOST, CPU, clip=kinds[CLIP](), skip=SKIP)
    values, window = state.tolist(), state[kernels.WINDOW.value :]
    mean, recent, deviation, count, spikes, accepting = values[: kernels.ACCEPTING.value + 1]
    counts = slice(kernels.SKIPPED.value, kernels.SPENT.value + 1)
    budget = BudgetState(tuple(window.roll(-turn).tolist()), *values[counts])
    rules.memory = Memory(((mean, recent, deviation, count, spikes, accepting), Rates(1.0)), budget)
    step = Step(
        sequence=1, number=0, norm=norm, found_inf=found_inf, edited=bool(facts & kernels.EDITED.value),
        learning_rate=10.0 if facts & kernels.PLANNED.value else 1.0,
    )  # fmt: skip
    rules.decide(step)
    history, after = rules.memory
    if history is not None:
        state[: kernels.ACCEPTING.value + 1] = torch.tensor(history[0], dtype=torch.float64)
    if after is not None:
        state[counts] = torch.tensor(after[1:], dtype=torch.float64)
        window[turn] = float(after.newest[-1])
    decision = step.decision
    assert decision is not None
    return 1.0 if decision.divisor is None else float(decision.divisor), bool(decision.skip)


def finish_step(
    observed: Tensor, loss: Tensor, row: Tensor, checksum: Tensor, defaults: Tensor, state: Tensor, decision: Tensor,
    squares: Tensor, statuses: Tensor, measurement: int, positions: Tensor, numbers: Tensor,
    local_squares: Tensor, local_statuses: Tensor, local_measurement: int, local_positions: Tensor,
    local_numbers: Tensor, layer_begin: Tensor, _: int, __: int, layers: int,
    carried: Tensor, loss_scale: Tensor, optimizer_scale: Tensor, found_inf: Tensor, sums: Tensor, sums_scale: Tensor,
    sums_sequence: int, facts: int, turn: int, sequence: int, number: int, flags: int,
    *, CLIP: int, SKIP: bool, DRY_RUN: bool, SUM_BLOCK: int, LAYER_BLOCK: int,
) -> None:  # fmt: skip
    has_local = bool(facts & kernels.HAS_LOCAL.value)
    scale, local_scale, theirs = float(carried), float(loss_scale), float(found_inf)
    averaged = summary_of(squares, statuses, measurement, positions, numbers, scale)
    divisor, skip = decide(state, float(averaged.total), theirs, facts, turn, CLIP=CLIP, SKIP=SKIP)
    columns = dict(zip(MEASURED_NAMES, defaults.tolist(), strict=True))
    if DRY_RUN:
        bits = (float(divisor > 1), float(skip))
        state[kernels.DRY_RUN_CLIPPED.value] += bits[0]
        state[kernels.DRY_RUN_SKIPPED.value] += bits[1]
        columns["shadow"] = bits[0] + 2 * bits[1]
    else:
        if SKIP and not facts & kernels.CANNOT_SKIP.value:
            theirs = float(skip or theirs > 0)
        decision.copy_(torch.tensor([divisor * float(optimizer_scale), theirs]))
        columns["clip_coefficient"] = 1 / divisor
    known = {"loss_scale": local_scale, "global_norm": averaged.total, "skipped": theirs}
    known |= {"global_nan_parameters": averaged.nan_parameters, "global_inf_parameters": averaged.inf_parameters}
    known |= {"first_nonfinite_global": averaged.first_nonfinite}
    if has_local:
        own = summary_of(local_squares, local_statuses, local_measurement, local_positions, local_numbers, local_scale)
        known |= {"local_norm": own.total, "first_nonfinite_local": own.first_nonfinite}
        known |= {"local_nan_parameters": own.nan_parameters, "local_inf_parameters": own.inf_parameters}
    newest = state[kernels.SUMS.value : kernels.WINDOW.value]
    if facts & kernels.HAS_SUMS.value:
        newest[0], newest[1:] = float(sums_sequence), sums
        newest[1] /= float(sums_scale) ** 2
    known |= dict(zip(REDUCED_NAMES, newest.tolist(), strict=True))
    begins = layer_begin.tolist()
    pairs = list(pairwise(begins))
    norms = [math.sqrt(float(squares[begin:end].sum())) / scale for begin, end in pairs]
    own_norms = [math.sqrt(float(local_squares[begin:end].sum())) / local_scale for begin, end in pairs]
    values = [*(columns | known).values(), *norms, *(own_norms if has_local else [0.0] * layers)]
    row.copy_(torch.tensor(values, dtype=torch.float64))
    assert not int(checksum[0]), "it was not cleared"
    checksum.copy_(torch.tensor([signed(device_checksum(row.numpy().tobytes())), sequence]))
    write_observed(observed, loss, number, flags or HAS_LOSS, sequence)
    observed[5] = sequence


def replace_kernels() -> None:
    """Let all launches of this process come here."""
    chunks_names, step_names = vars(chunks), vars(kernels)
    chunks_names["measure_chunks"] = Launch(measure_chunks)
    for function in (contribute, write_observed, finish_step):
        step_names[function.__name__] = Launch(function)
