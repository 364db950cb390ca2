"""The layout of a ring's file, and what its writer and its reader share.

A file is a header, then `slot_count` slots, then `weight_slots` slots. Record n lies in slot n % slot_count. A slot has
three parts, each written at its own time and each between two copies of the record's sequence number:

    begun      step, wall time, monotonic time, learning rate, flags     before the optimizer's step, on the host
    measured   MEASURED_NAMES, global layer norms, local layer norms     when the device has finished them
    observed   step, loss, which of the two are set                      when the script has called `observe`

The second slots have a part each, of the same form. Only some steps measure the weights by layer; of step n it lies in
slot n % weight_slots:

    weights    WEIGHT_BLOCKS, each [layers]                              before the measured part

The opening number is written first and the closing one last, so a reader that finds both equal, and the checksum
right, has the whole part. (A single closing number let 1 % of reads through torn; the checksum is for processors that
reorder stores, and costs about a microsecond per kilobyte.) The host writes a CRC-32; a part that a device has written
has the checksum of `device_checksum`. Measured parts are written in the order of their records, so one that is missing
below the newest will never come.
"""

from __future__ import annotations

import math
import mmap
import struct
import zlib
from enum import IntEnum
from operator import mul
from pathlib import Path
from typing import NamedTuple

from foreshock_protos.columns import MEASURED_NAMES, WEIGHT_BLOCKS

MAGIC = b"FORESHK1"
LAYOUT_VERSION = 9
COLUMNS_CHECKSUM = zlib.crc32(",".join((*MEASURED_NAMES, *WEIGHT_BLOCKS)).encode())
"""Probe and recorder may come from different environments: they must agree on the measured columns as well."""
MAX_RING_BYTES = 4 * 2**20
"""A container often has 64 MB of shared memory for eight ranks."""
MIN_SLOTS, MAX_SLOTS = 64, 4096
_SLOTS_PER_WEIGHT_SLOT = 8
"""Weights are measured on every tenth step at most."""

DROP_REASONS = ("probe_error", "ring_overrun", "given_up")
"""Why a record may be missing: the probe failed on that step; the ring was overwritten before it was read; or no
collector took it for so long that the ring was removed."""


class ExitReason(IntEnum):
    """Why a rank left, numbered as the contract's `ExitReason`. NONE while it is attached."""

    NONE = 0
    FINISHED = 1
    DETACHED = 2
    EXCEPTION = 3
    LOST = 4
    INTERRUPTED = 5


EDITED, NOT_STEPPED, GRADIENT_UNKNOWN = 4, 128, 256
"""Flags of a begun part, numbered as the contract's `RecordFlag`."""

# Header: fixed facts, then words that change while the ring is in use, then text and JSON.
FACTS = struct.Struct("<8sIIIIIIIQ")
"""Magic, version, checksum of the columns, slot bytes, slot count, layers, JSON bytes, process id, its start."""
WORD_BEGUN, WORD_ACKNOWLEDGED, WORD_EXIT_ACKNOWLEDGED = 8, 10, 11
WORD_EXIT_REASON, WORD_HEARTBEAT, WORD_BACKWARD_PASSES, WORD_IDLE, WORD_DROPPED = 12, 13, 14, 15, 16
WORD_HISTORY = 24
"""1 once the history behind it is written, which is `NormHistory`; the counts of dropped records end before it."""
TEXT_BYTES = 256
ERROR_OFFSET, PROBLEM_OFFSET, EXIT_DETAIL_OFFSET, PAGE_OFFSET, NOTICE_OFFSET = 256, 512, 768, 1024, 1280
JSON_OFFSET = 1536
HISTORY = struct.Struct("<5d")
_PAGE_BYTES = 4096


class NormHistory(NamedTuple):
    """Holds what a collector knows of the global norms of the attempt that this one continues."""

    mean: float
    """Exponentially weighted mean of the natural logarithm."""
    recent: float
    """Mean that forgets faster."""
    deviation: float
    """Mean absolute deviation from it."""
    steps: float
    """Number of steps; 0: nothing is known."""
    learning_rate: float
    """Newest learning rate; 0: unknown."""


class Part(NamedTuple):
    """Position of a part within its slot, in words of eight bytes: begin marker, payload, checksum, end marker."""

    begin: int
    words: int
    """Length of the payload."""

    @property
    def end(self) -> int:
        """Position of the end marker."""
        return self.begin + self.words + 2


BEGUN = Part(0, 5)
OBSERVED = Part(8, 3)
MEASURED_BEGIN = 14
RECORD_ROW = MEASURED_BEGIN - OBSERVED.begin
"""Words from the payload of the observed part to that of the measured part: a device writes both at once."""
BEGUN_PAYLOAD = struct.Struct("<qdddQ")
OBSERVED_PAYLOAD = struct.Struct("<qdQ")
HAS_STEP, HAS_LOSS = 1, 2


def device_checksum(payload: bytes) -> int:
    """Return a device's checksum of a payload: its words of eight bytes, each times an odd weight, modulo 2^64.

    Many threads can add their words in any order, which a CRC does not allow. A word that changes, changes the sum.
    """
    words = memoryview(payload).cast("Q")
    total: int = sum(map(mul, words, range(1, 2 * len(words), 2)))
    return total % 2**64


class Layout:
    """Offsets and sizes of a ring, given the number of layers."""

    def __init__(self, layers: int, identity_bytes: int, slot_count: int | None = None) -> None:
        self.layers = layers
        self.header_bytes = -(-(JSON_OFFSET + identity_bytes) // _PAGE_BYTES) * _PAGE_BYTES
        self.columns = len(MEASURED_NAMES) + 2 * layers
        self.measured = Part(MEASURED_BEGIN, self.columns)
        self.slot_bytes = 8 * (MEASURED_BEGIN + self.columns + 3)
        self.weights = Part(0, len(WEIGHT_BLOCKS) * layers)
        self.weight_slot_bytes = 8 * (self.weights.words + 3)
        fitting = MAX_RING_BYTES // (self.slot_bytes + self.weight_slot_bytes // _SLOTS_PER_WEIGHT_SLOT)
        self.slot_count = slot_count or max(MIN_SLOTS, min(MAX_SLOTS, fitting))
        self.weight_slots = self.slot_count // _SLOTS_PER_WEIGHT_SLOT + 1
        # With a common divisor, every tenth step would use a part of the slots only.
        while math.gcd(self.weight_slots, 10) > 1:
            self.weight_slots += 1
        self._weights_offset = self.header_bytes + self.slot_count * self.slot_bytes
        self.slot_words = range(self.header_bytes // 8, self._weights_offset // 8, self.slot_bytes // 8)
        """Index of the first word of each slot."""
        self.file_bytes = self._weights_offset + self.weight_slots * self.weight_slot_bytes

    def word(self, sequence: int) -> int:
        """Index of the first word of a record's slot."""
        return self.slot_words[sequence % self.slot_count]

    def weights_word(self, sequence: int) -> int:
        """Index of the first word of the slot for a record's weights."""
        return (self._weights_offset + (sequence % self.weight_slots) * self.weight_slot_bytes) // 8


class RingFile:
    """The mapped file: what writer and reader both read of it."""

    def __init__(self, path: Path, memory: mmap.mmap, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._measured = 0

    @property
    def begun(self) -> int:
        """Sequence number of the newest record; 0 before the first."""
        return self._words[WORD_BEGUN]

    @property
    def measured(self) -> int:
        """Sequence number of the newest record whose measured part is whole; 0 before the first.

        A device marks the end of a part in its slot and nowhere else, so the newest slots are searched.
        """
        begun = self.begun
        if len(self.memory) > self.layout.header_bytes:
            for sequence in range(begun, max(self._measured, begun - MIN_SLOTS, 0), -1):
                if self._words[self.layout.word(sequence) + self.layout.measured.end] == sequence:
                    self._measured = sequence
                    break
        return self._measured

    @property
    def acknowledged(self) -> int:
        """The highest sequence number that a collector has stored."""
        return self._words[WORD_ACKNOWLEDGED]

    @property
    def page(self) -> str:
        """Address of the run's page at the collector; empty before the collector has answered."""
        return self._read_text(PAGE_OFFSET)

    @property
    def notice(self) -> str:
        """What the collector says of the run: its newest incident or event, in a sentence; empty without one."""
        return self._read_text(NOTICE_OFFSET)

    @property
    def words(self) -> memoryview[int]:
        """The file as words of eight bytes."""
        return self._words

    @property
    def oldest(self) -> int:
        """The lowest sequence number that may still be readable."""
        return max(1, self.begun - self.layout.slot_count + 1)

    @property
    def idle(self) -> bool:
        """True while another training of the rank's process steps, and this one does not."""
        return bool(self._words[WORD_IDLE])

    def write_exit(self, reason: ExitReason, detail: str = "") -> None:
        """Record how the rank left. The recorder sends what is left of its records, then removes the ring."""
        self._write_text(EXIT_DETAIL_OFFSET, detail)
        # Last: a reader that finds the reason finds the detail as well.
        self._words[WORD_EXIT_REASON] = reason

    def _write_text(self, offset: int, text: str) -> None:
        data = text.encode(errors="replace")[: TEXT_BYTES - 1]
        self.memory[offset : offset + len(data) + 1] = data + b"\0"

    def _read_text(self, offset: int) -> str:
        return self.memory[offset : offset + TEXT_BYTES].split(b"\0", 1)[0].decode(errors="replace")
