"""Triton kernel for the norms of all gradients: one launch, whatever the number of parameters.

A gradient is cut into chunks of `CHUNK` elements, and each program sums the squares of one chunk. The sums are stored
side by side and added in a fixed order, never by floating-point atomics: every rank must come to the same norm, bit for
bit, or their clipping would differ.

Squares are added in float32 by each thread and in float64 across threads. Where that overflows or loses digits, the
chunk is summed again in float64, so that 1e25 and 1e-25 are exact to rounding in float32 too.

Triton's interpreter (`TRITON_INTERPRET=1`) runs these functions on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048
"""Elements that a program reads at once: eight for each of 256 threads."""
CHUNK = 8 * BLOCK
"""Elements of one program: enough to hide its start, and few enough that a model of a million keeps a GPU busy."""

FLOAT32, BFLOAT16, FLOAT16, FLOAT64, MIXED = (tl.constexpr(kind) for kind in range(5))
"""Kinds of gradients; `MIXED`: they differ between parameters."""
FINITE, HAS_INF, HAS_NAN, STATUSES = (tl.constexpr(status) for status in range(4))
"""Statuses of a parameter. The larger one wins, and each is stored beside the number of the measurement that found it,
so that none has to be cleared."""
NOWHERE = tl.constexpr(2**31 - 1)
"""Place of a parameter that no gradient makes bad."""

_INF = tl.constexpr(float("inf"))
_LEAST_SUM = tl.constexpr(1e-24)
"""A smaller sum of a chunk is looked at again. What float32 loses of `CHUNK` squares, each below its smallest normal
number, 1.2e-38, is less than 1e-9 of a larger one."""


@triton.jit
def _square_sum(address, begin, end, KIND: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of the squares of elements begin to end of the gradient at an address, a float64."""
    if KIND == FLOAT64:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif KIND == BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif KIND == FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if KIND == FLOAT64:
        wide = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, CHUNK, BLOCK):
            i = begin + start + tl.arange(0, BLOCK)
            x = tl.load(pointer + i, mask=i < end, other=0.0)
            wide += x * x
        total = tl.sum(wide)
    else:
        narrow = tl.zeros((BLOCK,), dtype=tl.float32)
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, CHUNK, BLOCK):
            i = begin + start + tl.arange(0, BLOCK)
            x = tl.load(pointer + i, mask=i < end, other=0.0).to(tl.float32)
            narrow += x * x
            largest = tl.maximum(largest, tl.abs(x))
        total = tl.sum(narrow.to(tl.float64))
        # A chunk of zeros is no underflow, and embeddings have many.
        if (total == _INF) | ((total < _LEAST_SUM) & (tl.max(largest) > 0)):
            wide = tl.zeros((BLOCK,), dtype=tl.float64)
            for start in range(0, CHUNK, BLOCK):
                i = begin + start + tl.arange(0, BLOCK)
                x = tl.load(pointer + i, mask=i < end, other=0.0).to(tl.float32).to(tl.float64)
                wide += x * x
            total = tl.sum(wide)
    return total


@triton.jit(do_not_specialize=["measurement", "checksum"])
def measure_chunks(
    addresses, kinds, sizes, chunk_parameter, chunk_begin, measurement, squares, statuses, checksum,
    KIND: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum the squares of every chunk, one in each program, and note which parameters are not finite.

    addresses, kinds, sizes: int64, int32 and int64, [parameters]; an address of 0 is no gradient. chunk_parameter,
    chunk_begin: int32 and int64, [chunks]. squares: float64, [chunks], written. statuses: int64, [parameters], raised
    to STATUSES * measurement + status where that is not FINITE. checksum: int64, [1], cleared for `finish_step`.
    """
    chunk = tl.program_id(0)
    if chunk == 0:
        tl.store(checksum, tl.zeros((), dtype=tl.int64))
    parameter = tl.load(chunk_parameter + chunk)
    address = tl.load(addresses + parameter)
    total = tl.zeros((), dtype=tl.float64)
    if address != 0:
        begin = tl.load(chunk_begin + chunk)
        end = tl.minimum(begin + CHUNK, tl.load(sizes + parameter))
        if KIND != MIXED:
            total = _square_sum(address, begin, end, KIND, BLOCK, CHUNK)
        else:
            kind = tl.load(kinds + parameter)
            if kind == FLOAT64:
                total = _square_sum(address, begin, end, FLOAT64, BLOCK, CHUNK)
            elif kind == BFLOAT16:
                total = _square_sum(address, begin, end, BFLOAT16, BLOCK, CHUNK)
            elif kind == FLOAT16:
                total = _square_sum(address, begin, end, FLOAT16, BLOCK, CHUNK)
            else:
                total = _square_sum(address, begin, end, FLOAT32, BLOCK, CHUNK)
    tl.store(squares + chunk, total)
    if (total != total) | (total == _INF):
        status = tl.where(total == _INF, HAS_INF, HAS_NAN).to(tl.int64)
        tl.atomic_max(statuses + parameter, measurement.to(tl.int64) * STATUSES + status)


@triton.jit
def sum_squares(squares, begin, end, BLOCK: tl.constexpr):
    """Sum of squares[begin:end], always in the same order."""
    parts = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        parts += tl.load(squares + i, mask=i < end, other=0.0)
    return tl.sum(parts)


@triton.jit
def count_nonfinite(statuses, measurement, positions, parameters, BLOCK: tl.constexpr):
    """Parameters with a NaN, those with an Inf and no NaN, and the lowest position of one that has either."""
    base = measurement.to(tl.int64) * STATUSES
    nans = tl.zeros((BLOCK,), dtype=tl.int32)
    infs = tl.zeros((BLOCK,), dtype=tl.int32)
    first = tl.full((BLOCK,), NOWHERE, dtype=tl.int32)
    for start in range(0, parameters, BLOCK):
        i = start + tl.arange(0, BLOCK)
        status = tl.load(statuses + i, mask=i < parameters, other=0) - base
        position = tl.load(positions + i, mask=i < parameters, other=NOWHERE)
        nans += (status == HAS_NAN).to(tl.int32)
        infs += (status == HAS_INF).to(tl.int32)
        first = tl.minimum(first, tl.where(status > 0, position, NOWHERE))
    return tl.sum(nans).to(tl.float64), tl.sum(infs).to(tl.float64), tl.min(first)
