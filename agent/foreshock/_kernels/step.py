"""Triton kernels for all that follows from the norms: a rank's part of the sum over ranks, the decision on a step, and
its record.

Arguments are the same from step to step: whatever is absent has a neutral value and a bit in `facts`, so that the one
variant of each kernel that a run needs is compiled at attach. What is decided is written in `rules.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock._control import apply, decide
from foreshock._kernels.chunks import NOWHERE, count_nonfinite, sum_squares
from foreshock._kernels.rules import clip_divisor, grant_skip, update_history
from foreshock_protos.columns import MEASURED_NAMES, REDUCED_NAMES

SUM_BLOCK = 1024
"""Chunks or parameters that the last program reads at once."""
LAYER_BLOCK = 128

NO_CLIP, NORM_CLIP, ADAPTIVE_CLIP = (tl.constexpr(clip) for clip in range(3))
HAS_LOCAL, HAS_SUMS, PLANNED, EDITED, CANNOT_SKIP = (tl.constexpr(1 << bit) for bit in range(5))
"""Bits of `facts`: this rank's own gradient is measured; a sum over ranks has arrived; the learning rate was just
changed; the script has clipped by itself; the optimizer can no longer skip a step."""

(
    MEAN,
    RECENT,
    DEVIATION,
    COUNT,
    SPIKES,
    ACCEPTING,
    SKIPPED,
    BAD_IN_A_ROW,
    SPENT,
    DRY_RUN_CLIPPED,
    DRY_RUN_SKIPPED,
    LIMIT,
    SUMS,
) = (tl.constexpr(index) for index in range(13))
"""Where a number of the state lies. `LIMIT`: the largest norm that is not clipped, which would be rounded to float32 as
an argument of a kernel. From `SUMS` on: REDUCED_NAMES of the newest sum over ranks."""
WINDOW = tl.constexpr(SUMS.value + len(REDUCED_NAMES))
"""From here on, the state has 1 for each of the newest steps that was skipped, else 0."""
STATE_SIZE = WINDOW.value + decide.WINDOW

_INF = tl.constexpr(float("inf"))
_CLIPPED = tl.constexpr(apply.CLIPPED)
_SKIPPED = tl.constexpr(apply.SKIPPED)

SCALARS = tl.constexpr(len(MEASURED_NAMES))
_REDUCED = tl.constexpr(len(MEASURED_NAMES) - len(REDUCED_NAMES))
_REDUCED_SQUARE = tl.constexpr(MEASURED_NAMES.index("reduced_square_sum"))
_SCALAR_BLOCK = tl.constexpr(triton.next_power_of_2(len(MEASURED_NAMES)))


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(MEASURED_NAMES.index(name))


_LOSS_SCALE = _column("loss_scale")
_GLOBAL_NORM, _LOCAL_NORM = _column("global_norm"), _column("local_norm")
_GLOBAL_NAN, _GLOBAL_INF = _column("global_nan_parameters"), _column("global_inf_parameters")
_LOCAL_NAN, _LOCAL_INF = _column("local_nan_parameters"), _column("local_inf_parameters")
_FIRST_GLOBAL, _FIRST_LOCAL = _column("first_nonfinite_global"), _column("first_nonfinite_local")
COEFFICIENT = _column("clip_coefficient")
_SKIPPED_COLUMN, _SHADOW_COLUMN = _column("skipped"), _column("shadow")


@triton.jit(do_not_specialize=["chunks", "measurement", "parameters", "loss", "has_loss"])
def contribute(
    squares, chunks, statuses, measurement, positions, parameters, loss, has_loss, contribution, BLOCK: tl.constexpr
):
    """Write what a rank adds to the sum over ranks, as `RankSums.contribution` defines it. One program.

    loss: float64, one element. has_loss: 1 or 0. contribution: float64, [len(SUM_FIELDS)].
    """
    square = sum_squares(squares, 0, chunks, BLOCK)
    nans, infs, _ = count_nonfinite(statuses, measurement, positions, parameters, BLOCK)
    tl.store(contribution, tl.where(tl.abs(square) < _INF, square, 0.0))
    tl.store(contribution + 1, tl.minimum(nans, 1.0))
    tl.store(contribution + 2, tl.minimum(infs, 1.0))
    tl.store(contribution + 3, (square == 0).to(tl.float64))
    value = tl.load(loss)
    observed = has_loss != 0
    known = observed & (tl.abs(value) < _INF)
    tl.store(contribution + 4, tl.where(known, value, 0.0))
    tl.store(contribution + 5, known.to(tl.float64))
    tl.store(contribution + 6, (observed & (value != value)).to(tl.float64))
    tl.store(contribution + 7, (observed & (tl.abs(value) == _INF)).to(tl.float64))


@triton.jit
def _check(values, index):
    """Part of a row's checksum: see `foreshock_recorder.layout.device_checksum`."""
    return tl.sum(values.to(tl.int64, bitcast=True) * (2 * index.to(tl.int64) + 1))


@triton.jit
def _number(numbers, position):
    """The collector's number of the parameter at a position; -1 where no parameter is at fault."""
    known = position != NOWHERE
    return tl.where(known, tl.load(numbers + position, mask=known, other=0), -1).to(tl.float64)


@triton.jit
def _observe(words, loss, number, flags, sequence):
    """Write the ring's observed part, from its payload to its end marker. words: int64, [5]."""
    bits = tl.load(loss).to(tl.int64, bitcast=True)
    tl.store(words, number)
    tl.store(words + 1, bits)
    tl.store(words + 2, flags)
    tl.store(words + 3, number + bits * 3 + flags * 5)
    tl.store(words + 4, sequence)


@triton.jit(do_not_specialize=["loss", "number", "flags", "sequence"])
def write_observed(words, loss, number, flags, sequence):
    """Write what the script observed of a step after it. The arguments are those of `finish_step`."""
    _observe(words, loss, number.to(tl.int64), flags.to(tl.int64), sequence.to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "loss", "measurement", "local_measurement", "chunks", "parameters", "layers", "carried", "loss_scale",
        "optimizer_scale", "found_inf", "sums", "sums_scale", "sums_sequence", "facts", "turn", "sequence", "number",
        "flags",
    ],
)  # fmt: skip
def finish_step(
    observed, loss, row, checksum, defaults, state, decision,
    squares, statuses, measurement, positions, numbers,
    local_squares, local_statuses, local_measurement, local_positions, local_numbers,
    layer_begin, chunks, parameters, layers,
    carried, loss_scale, optimizer_scale, found_inf, sums, sums_scale, sums_sequence,
    facts, turn, sequence, number, flags,
    CLIP: tl.constexpr, SKIP: tl.constexpr, DRY_RUN: tl.constexpr,
    SUM_BLOCK: tl.constexpr, LAYER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the record's row and the decision on the step. One program for each layer, and one for everything else.

    observed: int64, [6], written: the ring's observed part as `write_observed` writes it, and the measured part's begin
    marker; with loss, number and flags, its words. row: float64, [columns], written. checksum: int64, [2], its first
    word cleared: receives the row's checksum, then `sequence`. defaults: float64, [SCALARS], what the row has where
    nothing was measured. state: float64, [STATE_SIZE]. decision: float32, [2], written: the divisor that the optimizer
    takes, and 1 where it shall skip the step.

    squares, statuses, measurement: of the averaged gradient, as `measure_chunks` wrote them. positions: int32,
    [parameters], the place of each in the order in which the first bad one is found. numbers: int64, [parameters], how
    the collector numbers the parameter at each place. local_...: the same of this rank's gradient, with HAS_LOCAL.
    layer_begin: int32, [layers + 1], the first chunk of each layer.

    float64, one element each: loss; carried, the scale of the averaged gradient; loss_scale, of the loss and the local
    gradient; optimizer_scale, what the optimizer divides by anyway; found_inf, not zero where it skips anyway. sums,
    with HAS_SUMS: float64, [len(SUM_FIELDS)], the newest sum over ranks; sums_scale, the scale of its losses, and
    sums_sequence, of its record. turn: index of the step in the budget's window.
    """
    program = tl.program_id(0)
    has_local = (facts & HAS_LOCAL) != 0
    scale = tl.load(carried)
    local_scale = tl.load(loss_scale)
    if program < layers:
        begin = tl.load(layer_begin + program)
        end = tl.load(layer_begin + program + 1)
        norm = tl.sqrt(sum_squares(squares, begin, end, LAYER_BLOCK)) / scale
        local = tl.sqrt(sum_squares(local_squares, begin, end, LAYER_BLOCK)) / local_scale
        local = tl.where(has_local, local, 0.0)
        index = program + layers * tl.arange(0, 2) + SCALARS
        both = tl.where(tl.arange(0, 2) == 0, norm, local)
        tl.store(row + index, both)
        tl.atomic_add(checksum, _check(both, index))
    else:
        total = tl.sqrt(sum_squares(squares, 0, chunks, SUM_BLOCK)) / scale
        nans, infs, first = count_nonfinite(statuses, measurement, positions, parameters, SUM_BLOCK)

        # -- decide --
        theirs = tl.load(found_inf)
        ceiling = tl.full((), _INF, dtype=tl.float64)
        far = total < 0
        if SKIP or CLIP == ADAPTIVE_CLIP:
            ceiling, far, mean, recent, deviation, count, spikes, accepting = update_history(
                total,
                (facts & PLANNED) != 0,
                tl.load(state + MEAN),
                tl.load(state + RECENT),
                tl.load(state + DEVIATION),
                tl.load(state + COUNT),
                tl.load(state + SPIKES),
                tl.load(state + ACCEPTING),
            )
            tl.store(state + MEAN, mean)
            tl.store(state + RECENT, recent)
            tl.store(state + DEVIATION, deviation)
            tl.store(state + COUNT, count)
            tl.store(state + SPIKES, spikes)
            tl.store(state + ACCEPTING, accepting)
        skip = total < 0
        if SKIP:
            bad = (far | ((tl.abs(total) < _INF) == 0)) & (theirs == 0)
            skip, skipped, in_a_row, spent = grant_skip(
                bad,
                tl.load(state + WINDOW + turn),
                tl.load(state + SKIPPED),
                tl.load(state + BAD_IN_A_ROW),
                tl.load(state + SPENT),
            )
            tl.store(state + WINDOW + turn, skip.to(tl.float64))
            tl.store(state + SKIPPED, skipped)
            tl.store(state + BAD_IN_A_ROW, in_a_row)
            tl.store(state + SPENT, spent)
        divisor = tl.full((), 1.0, dtype=tl.float64)
        if CLIP != NO_CLIP:
            limited = clip_divisor(total, tl.minimum(ceiling, tl.load(state + LIMIT)))
            divisor = tl.where((facts & EDITED) != 0, 1.0, limited)

        # -- act, or count --
        i = tl.arange(0, _SCALAR_BLOCK)
        values = tl.load(defaults + i, mask=i < SCALARS, other=0.0)
        if DRY_RUN:
            clipped = (divisor > 1).to(tl.float64)
            skips = skip.to(tl.float64)
            tl.store(state + DRY_RUN_CLIPPED, tl.load(state + DRY_RUN_CLIPPED) + clipped)
            tl.store(state + DRY_RUN_SKIPPED, tl.load(state + DRY_RUN_SKIPPED) + skips)
            values = tl.where(i == _SHADOW_COLUMN, clipped * _CLIPPED + skips * _SKIPPED, values)
        else:
            if SKIP:
                both_skip = (skip | (theirs > 0)).to(tl.float64)
                theirs = tl.where((facts & CANNOT_SKIP) != 0, theirs, both_skip)
            tl.store(decision, (divisor * tl.load(optimizer_scale)).to(tl.float32))
            tl.store(decision + 1, theirs.to(tl.float32))
            values = tl.where(i == COEFFICIENT, 1 / divisor, values)

        # -- record --
        values = tl.where(i == _LOSS_SCALE, local_scale, values)
        values = tl.where(i == _GLOBAL_NORM, total, values)
        values = tl.where(i == _GLOBAL_NAN, nans, values)
        values = tl.where(i == _GLOBAL_INF, infs, values)
        values = tl.where(i == _FIRST_GLOBAL, _number(numbers, first), values)
        values = tl.where(i == _SKIPPED_COLUMN, theirs, values)
        if has_local:
            local_total = tl.sqrt(sum_squares(local_squares, 0, chunks, SUM_BLOCK)) / local_scale
            local_nans, local_infs, local_first = count_nonfinite(
                local_statuses, local_measurement, local_positions, parameters, SUM_BLOCK
            )
            values = tl.where(i == _LOCAL_NORM, local_total, values)
            values = tl.where(i == _LOCAL_NAN, local_nans, values)
            values = tl.where(i == _LOCAL_INF, local_infs, values)
            values = tl.where(i == _FIRST_LOCAL, _number(local_numbers, local_first), values)
        reduced = (i >= _REDUCED) & (i < SCALARS)
        newest = tl.load(state + SUMS + i - _REDUCED, mask=reduced, other=0.0)
        if (facts & HAS_SUMS) != 0:
            newest = tl.load(sums + i - _REDUCED - 1, mask=reduced & (i > _REDUCED), other=0.0)
            newest = tl.where(i == _REDUCED, sums_sequence.to(tl.float64), newest)
            square_scale = tl.load(sums_scale)
            newest = tl.where(i == _REDUCED_SQUARE, newest / (square_scale * square_scale), newest)
            tl.store(state + SUMS + i - _REDUCED, newest, mask=reduced)
        values = tl.where(reduced, newest, values)
        values = tl.where(i < SCALARS, values, 0.0)
        tl.store(row + i, values, mask=i < SCALARS)
        tl.atomic_add(checksum, _check(values, i))
        tl.store(checksum + 1, sequence.to(tl.int64))
        _observe(observed, loss, number.to(tl.int64), flags.to(tl.int64), sequence.to(tl.int64))
        tl.store(observed + 5, sequence.to(tl.int64))
