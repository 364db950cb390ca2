"""The reading side of a rank's ring: the recorder's. Its layout is layout.py's."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from foreshock_recorder.layout import (
    BEGUN,
    BEGUN_PAYLOAD,
    COLUMNS_CHECKSUM,
    DROP_REASONS,
    ERROR_OFFSET,
    EXIT_DETAIL_OFFSET,
    FACTS,
    HAS_LOSS,
    HAS_STEP,
    HISTORY,
    JSON_OFFSET,
    LAYOUT_VERSION,
    MAGIC,
    OBSERVED,
    OBSERVED_PAYLOAD,
    PAGE_OFFSET,
    PROBLEM_OFFSET,
    TEXT_BYTES,
    WORD_ACKNOWLEDGED,
    WORD_BACKWARD_PASSES,
    WORD_BEGUN,
    WORD_DROPPED,
    WORD_EXIT_ACKNOWLEDGED,
    WORD_EXIT_REASON,
    WORD_HEARTBEAT,
    WORD_HISTORY,
    ExitReason,
    Layout,
    NormHistory,
    Part,
    RingFile,
    device_checksum,
)

_FILE_LOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, process


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


class RingReader(RingFile):
    """The reading side. Raises `ValueError` for a file that is not a ring of this layout."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        memory = mmap.mmap(self._descriptor, 0)
        if len(memory) < JSON_OFFSET:
            raise ValueError(f"{path} is not a ring: it is shorter than a header")
        magic, version, columns, slot_bytes, slots, layers, text, pid, started = FACTS.unpack_from(memory, 0)
        if (magic, version, columns) != (MAGIC, LAYOUT_VERSION, COLUMNS_CHECKSUM):
            raise ValueError(f"{path} is not a ring of layout {LAYOUT_VERSION}: made by another version of foreshock?")
        # Each layer has a name there; a number out of thin air could ask for all memory.
        if layers > text:
            raise ValueError(f"{path} is damaged: it has no room for the names of {layers} layers")
        layout = Layout(layers, text, slots)
        self.given_up = len(memory) == layout.header_bytes
        """True if it was cut down to its header: only its counts and its exit reason are left."""
        if slot_bytes != layout.slot_bytes or (len(memory) != layout.file_bytes and not self.given_up):
            raise ValueError(f"{path} is damaged: its size is not what its header says")
        super().__init__(path, memory, layout)
        self.pid: int = pid
        self.process_start: int = started
        """Clock ticks after boot at which that process started."""
        self.identity = _identity(path, memory[JSON_OFFSET : JSON_OFFSET + text])

    def read(self, sequence: int) -> Record | ReadOutcome:
        """Return the record, as far as it is written.

        NOT_YET: its step has not begun. OVERRUN: a newer record has taken its slot.
        """
        if sequence > self.begun:
            return ReadOutcome.NOT_YET
        if self.given_up:
            return ReadOutcome.OVERRUN
        slot = self.layout.word(sequence)
        begun = self._part(BEGUN, slot, sequence)
        observed = self._part(OBSERVED, slot, sequence)
        measured = self._part(self.layout.measured, slot, sequence)
        weights = self._part(self.layout.weights, self.layout.weights_word(sequence), sequence)
        # Asked last: a part that was overwritten just now must not look like one that was never written.
        if begun is None or sequence < self.oldest:
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

    def acknowledge(self, sequence: int, *, exited: bool = False) -> None:
        """Write how far the collector has stored: for the rank, and for a recorder that may follow.

        exited: it has stored the exit reason as well.
        """
        self._words[WORD_ACKNOWLEDGED] = sequence
        self._words[WORD_EXIT_ACKNOWLEDGED] = exited

    def write_problem(self, text: str) -> None:
        """Write why the collector cannot be reached; empty: it can."""
        self._write_text(PROBLEM_OFFSET, text)

    def write_page(self, address: str) -> None:
        """Write where the run's page is. An address that does not fit is left out: half of it leads nowhere."""
        self._write_text(PAGE_OFFSET, address if len(address) < TEXT_BYTES else "")

    def write_history(self, history: NormHistory) -> None:
        """Write what the collector knows of the attempt that the rank continues."""
        HISTORY.pack_into(self.memory, 8 * (WORD_HISTORY + 1), *history)
        # Last: a rank that finds it finds the numbers as well.
        self._words[WORD_HISTORY] = 1

    def heartbeat(self, monotonic: float) -> None:
        """Show the rank that a recorder polls its ring."""
        self._words[WORD_HEARTBEAT] = struct.unpack("<Q", struct.pack("<d", monotonic))[0]

    @property
    def oldest(self) -> int:
        """The lowest sequence number that may still be readable."""
        kept = 0 if self.given_up else self.layout.slot_count
        return max(1, self.begun - kept + 1)

    @property
    def backward_passes(self) -> int:
        """Backward passes that the rank has computed, counted before it waits for the other ranks."""
        return self._words[WORD_BACKWARD_PASSES]

    @property
    def exit_reason(self) -> ExitReason:
        """Why the rank left; NONE while it is attached, and where the file holds no reason that is known."""
        with suppress(ValueError):
            return ExitReason(self._words[WORD_EXIT_REASON])
        return ExitReason.NONE

    @property
    def exit_detail(self) -> str:
        """Details of the exit, such as the exception or the signal."""
        return self._read_text(EXIT_DETAIL_OFFSET)

    @property
    def last_error(self) -> str:
        """The probe's last internal error."""
        return self._read_text(ERROR_OFFSET)

    @property
    def dropped(self) -> dict[str, int]:
        """Records that the probe could not write, by reason, since the attach; reasons without any are left out."""
        counts = {reason: self._words[WORD_DROPPED + i] for i, reason in enumerate(DROP_REASONS)}
        return {reason: count for reason, count in counts.items() if count}

    @property
    def alive(self) -> bool:
        """True while the process that made the ring runs: it holds a lock on the file, in whatever container it is."""
        asked = _FILE_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found: int = _FILE_LOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, asked))[0]
        return found != fcntl.F_UNLCK

    @property
    def modified(self) -> float:
        """Unix seconds at which the file was made or cut, as far as its file system knows of writes to memory."""
        return os.fstat(self._descriptor).st_mtime

    def check_size(self) -> None:
        """Raise `ValueError` if the file has been cut or extended: reading beyond its end would kill this process."""
        if os.fstat(self._descriptor).st_size != len(self.memory):
            raise ValueError(f"{self.path} is damaged: its size has changed")

    def give_up(self) -> int:
        """Cut the ring of a dead rank down to its header and close it. Return how many records are lost by that.

        The header counts them, until a collector has stored that count.
        """
        lost = max(0, self.begun - self.acknowledged)
        self._words[WORD_DROPPED + DROP_REASONS.index("given_up")] += lost
        # What is counted as given up must not look overwritten as well.
        self._words[WORD_BEGUN] = self.acknowledged
        os.ftruncate(self._descriptor, self.layout.header_bytes)
        self.close()
        return lost

    def close(self) -> None:
        """Unmap the memory; the file stays."""
        self._words.release()
        self._bytes.release()
        self.memory.close()
        self._close_descriptor()

    def _part(self, part: Part, slot: int, sequence: int) -> bytes | None:
        """Return a part of a record; None unless it is whole. slot: its first word."""
        begin = slot + part.begin
        start, end = begin + 1, begin + 1 + part.words
        if self._words[end + 1] != sequence:
            return None
        data = bytes(self._bytes[8 * start : 8 * end])
        checksum = self._words[end]
        whole = self._words[begin] == sequence and (checksum == zlib.crc32(data) or checksum == device_checksum(data))
        return data if whole else None


def _identity(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its identity is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: its identity is no object")
    return found
