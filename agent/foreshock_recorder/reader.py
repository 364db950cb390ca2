"""The reading side of a rank's ring. Its layout is ring.py's."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import weakref
import zlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from foreshock_recorder.ring import (
    DROP_REASONS,
    FACTS,
    FAREWELL_OFFSET,
    HAS_LOSS,
    HAS_STEP,
    JSON_OFFSET,
    LAUNCHED,
    LAUNCHED_PAYLOAD,
    LAYOUT_VERSION,
    MAGIC,
    NOTE_OFFSET,
    OBSERVED,
    OBSERVED_PAYLOAD,
    PAGE_OFFSET,
    TEXT_BYTES,
    TROUBLE_OFFSET,
    WORD_ACKNOWLEDGED,
    WORD_ACKNOWLEDGED_FAREWELL,
    WORD_BACKWARD_PASSES,
    WORD_DROPPED,
    WORD_FAREWELL,
    WORD_HEARTBEAT,
    WORD_LAUNCHED,
    Farewell,
    Layout,
    Part,
    Side,
)

_FILE_LOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, process


class ReadOutcome(Enum):
    """Why `RingReader.read` has no record to give."""

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
    """float64: DEVICE_COLUMNS, then global layer norms, then local ones. None: launched, never finished."""
    observed: bool
    """The observed part is written; without it, the script may still tell its step and loss."""
    loss: float | None


class RingReader(Side):
    """The reading side. Raises `ValueError` for a file that is no ring of this layout."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._let_go = weakref.finalize(self, os.close, self._descriptor)
        memory = mmap.mmap(self._descriptor, 0)
        if len(memory) < JSON_OFFSET:
            raise ValueError(f"{path} is no ring: it is shorter than a header")
        facts = FACTS.unpack_from(memory, 0)
        magic, version, slot_bytes, slots, layers, text = facts[:6]
        if magic != MAGIC or version != LAYOUT_VERSION:
            raise ValueError(f"{path} is not a ring of layout {LAYOUT_VERSION}: made by another version of foreshock?")
        layout = Layout(layers, text, slots)
        self.given_up = len(memory) == layout.header_bytes
        """Cut down to its header: only what it counts and how its rank ended is left."""
        if slot_bytes != layout.slot_bytes or (len(memory) != layout.file_bytes and not self.given_up):
            raise ValueError(f"{path} is damaged: its size is not what its header says")
        super().__init__(path, memory, layout)
        self.pid: int = facts[6]
        self.process_start: int = facts[7]
        self.identity: dict[str, Any] = json.loads(memory[JSON_OFFSET : JSON_OFFSET + text])

    def read(self, sequence: int) -> Record | ReadOutcome:
        """The record, as far as it is written. NOT_YET: not launched. OVERRUN: a newer one has taken its slot."""
        if sequence > self.launched:
            return ReadOutcome.NOT_YET
        if self.given_up:
            return ReadOutcome.OVERRUN
        launched = self._part(LAUNCHED, sequence)
        observed = self._part(OBSERVED, sequence)
        measured = self._part(self.layout.measured, sequence)
        # Asked last: a part that was overwritten just now must not look like one that was never written.
        if launched is None or sequence < self.oldest:
            return ReadOutcome.OVERRUN
        step, wall, monotonic, learning_rate, flags = LAUNCHED_PAYLOAD.unpack(launched)
        loss = None
        if observed is not None:
            told_step, told_loss, told = OBSERVED_PAYLOAD.unpack(observed)
            step = told_step if told & HAS_STEP else step
            loss = told_loss if told & HAS_LOSS else None
        return Record(
            sequence=sequence,
            step=step,
            wall_seconds=wall,
            monotonic_seconds=monotonic,
            learning_rate=learning_rate,
            flags=flags,
            measured=None if measured is None else memoryview(measured).cast("d"),
            observed=observed is not None,
            loss=loss,
        )

    def acknowledge(self, sequence: int, *, farewell: bool = False) -> None:
        """Tell the rank, and a recorder that may follow, how far the collector has stored."""
        self._words[WORD_ACKNOWLEDGED] = sequence
        self._words[WORD_ACKNOWLEDGED_FAREWELL] = farewell

    def trouble(self, text: str) -> None:
        """Tell the rank why the collector cannot be reached; empty: it can."""
        self._write_text(TROUBLE_OFFSET, text)

    def page(self, address: str) -> None:
        """Tell the rank where its run's page is. One that does not fit is left out: half of it leads nowhere."""
        self._write_text(PAGE_OFFSET, address if len(address) < TEXT_BYTES else "")

    @property
    def page_address(self) -> str:
        """What the rank was told of it."""
        return self._read_text(PAGE_OFFSET)

    def heartbeat(self, monotonic: float) -> None:
        """Tell the rank that a recorder is looking."""
        self._words[WORD_HEARTBEAT] = struct.unpack("<Q", struct.pack("<d", monotonic))[0]

    @property
    def oldest(self) -> int:
        """The lowest sequence number that may still be readable."""
        kept = 0 if self.given_up else self.layout.slot_count
        return max(1, self.launched - kept + 1)

    @property
    def backward_passes(self) -> int:
        """Backward passes that the rank has computed, counted before it waits for the others'."""
        return self._words[WORD_BACKWARD_PASSES]

    @property
    def farewell(self) -> Farewell:
        """How the rank left, NONE while it has not said."""
        return Farewell(self._words[WORD_FAREWELL])

    @property
    def farewell_detail(self) -> str:
        """What the rank said about it."""
        return self._read_text(FAREWELL_OFFSET)

    @property
    def note(self) -> str:
        """The probe's last internal error."""
        return self._read_text(NOTE_OFFSET)

    @property
    def dropped(self) -> dict[str, int]:
        """Records that the probe could not write, by reason, since the attach; reasons without any are left out."""
        counts = {reason: self._words[WORD_DROPPED + i] for i, reason in enumerate(DROP_REASONS)}
        return {reason: count for reason, count in counts.items() if count}

    @property
    def alive(self) -> bool:
        """The process that made the ring still runs: its lock on the file is there, in whatever container it lives."""
        asked = _FILE_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found: int = _FILE_LOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, asked))[0]
        return found != fcntl.F_UNLCK

    @property
    def changed(self) -> float:
        """Unix seconds at which the file was made or cut, as far as its file system knows of writes to memory."""
        return os.fstat(self._descriptor).st_mtime

    def say_farewell(self, reason: Farewell, detail: str) -> None:
        """Say goodbye for a rank that could not: for this recorder, and for one that may follow."""
        self._write_farewell(reason, detail)

    def give_up(self) -> int:
        """Cut the ring of a dead rank down to its header, and let go of it. The records lost by it are counted there.

        How many those are.
        """
        lost = max(0, self.launched - self.acknowledged)
        self._words[WORD_DROPPED + DROP_REASONS.index("given_up")] += lost
        # What is counted as given up must not look overwritten as well.
        self._words[WORD_LAUNCHED] = self.acknowledged
        os.ftruncate(self._descriptor, self.layout.header_bytes)
        self.close()
        return lost

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        self._words.release()
        self._bytes.release()
        self.memory.close()
        self._let_go()

    def _part(self, part: Part, sequence: int) -> bytes | None:
        begin = self.layout.word(sequence) + part.begin
        start, end = begin + 1, begin + 1 + part.words
        if self._words[end + 1] != sequence:
            return None
        data = bytes(self._bytes[8 * start : 8 * end])
        whole = self._words[begin] == sequence and self._words[end] == zlib.crc32(data)
        return data if whole else None
