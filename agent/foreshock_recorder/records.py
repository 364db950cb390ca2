"""Reads a record back out of a ring: in the recorder, and in the rank itself to mirror it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import Enum

from foreshock_recorder.layout import (
    BEGUN,
    BEGUN_PAYLOAD,
    HAS_LOSS,
    HAS_STEP,
    OBSERVED,
    OBSERVED_PAYLOAD,
    Part,
    RingFile,
    device_checksum,
)


class ReadOutcome(Enum):
    """Why `RingReader.read` has no record to return."""

    NOT_YET = "not yet"
    OVERRUN = "overrun"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step of one rank, as read back."""

    sequence: int
    step: int
    wall_seconds: float
    monotonic_seconds: float
    learning_rate: float
    flags: int
    """EDITED: the script changed the gradients between backward and step. NOT_STEPPED: its optimizer was not called.
    GRADIENT_UNKNOWN: the averaged gradient was not measured."""
    measured: memoryview[float] | None
    """float64: MEASURED_NAMES, then global layer norms, then local ones. None: the step began and never finished."""
    weights: memoryview[float] | None
    """float64: WEIGHT_BLOCKS, each [layers]. None: the step has not measured the weights by layer."""
    observed: bool
    """True if the observed part is written; without it, the script may still pass its step and loss."""
    loss: float | None


def read_record(ring: RingFile, sequence: int) -> Record | ReadOutcome:
    """Return the record, as far as it is written.

    NOT_YET: its step has not begun. OVERRUN: a newer record has taken its slot.
    """
    if sequence > ring.begun:
        return ReadOutcome.NOT_YET
    layout = ring.layout
    slot = layout.word(sequence)
    begun = _part(ring, BEGUN, slot, sequence)
    observed = _part(ring, OBSERVED, slot, sequence)
    measured = _part(ring, layout.measured, slot, sequence)
    weights = _part(ring, layout.weights, layout.weights_word(sequence), sequence)
    # Asked last: a part that was overwritten just now must not look like one that was never written.
    if begun is None or sequence < ring.oldest:
        return ReadOutcome.OVERRUN
    step, wall, monotonic, learning_rate, flags = BEGUN_PAYLOAD.unpack(begun)
    loss = None
    if observed is not None:
        observed_step, observed_loss, given = OBSERVED_PAYLOAD.unpack(observed)
        step = observed_step if given & HAS_STEP else step
        loss = observed_loss if given & HAS_LOSS else None
    return Record(
        sequence=sequence,
        step=step,
        wall_seconds=wall,
        monotonic_seconds=monotonic,
        learning_rate=learning_rate,
        flags=flags,
        measured=None if measured is None else memoryview(measured).cast("d"),
        weights=None if weights is None else memoryview(weights).cast("d"),
        observed=observed is not None,
        loss=loss,
    )


def _part(ring: RingFile, part: Part, slot: int, sequence: int) -> bytes | None:
    """Return a part of a record; None unless it is whole. slot: its first word."""
    begin = slot + part.begin
    start, end = begin + 1, begin + 1 + part.words
    words = ring.words
    if words[end + 1] != sequence:
        return None
    data = bytes(ring.memory[8 * start : 8 * end])
    checksum = words[end]
    whole = words[begin] == sequence and (checksum == zlib.crc32(data) or checksum == device_checksum(data))
    return data if whole else None
