"""The reading side of a rank's ring: the recorder's. Its layout is layout.py's."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from foreshock_recorder.layout import (
    COLUMNS_CHECKSUM,
    DROP_REASONS,
    ERROR_OFFSET,
    EXIT_DETAIL_OFFSET,
    FACTS,
    HISTORY,
    JSON_OFFSET,
    LAYOUT_VERSION,
    MAGIC,
    NOTICE_OFFSET,
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
    RingFile,
)
from foreshock_recorder.records import ReadOutcome, Record, read_record

_FILE_LOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, process


class RingReader(RingFile):
    """The reading side. Raises `ValueError` for a file that is not a ring of this layout."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        memory = mmap.mmap(self._descriptor, 0)
        if len(memory) < JSON_OFFSET:
            raise ValueError(f"{path} is not a ring: it is shorter than a header")
        self._facts = memory[: FACTS.size]
        magic, version, columns, slot_bytes, slots, layers, text, pid, started = FACTS.unpack(self._facts)
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
        """Return the record, as far as it is written."""
        if self.given_up:
            return ReadOutcome.OVERRUN if sequence <= self.begun else ReadOutcome.NOT_YET
        return read_record(self, sequence)

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

    def write_notice(self, text: str) -> None:
        """Write what the collector says of the run, for the tools that mirror it."""
        self._write_text(NOTICE_OFFSET, text)

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
        return max(1, self.begun + 1) if self.given_up else super().oldest

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

    def check(self) -> None:
        """Raise `ValueError` if the file has been cut or extended, or its header overwritten.

        Reading beyond its end would kill this process, and what follows an overwritten header may count anything.
        """
        if os.fstat(self._descriptor).st_size != len(self.memory):
            raise ValueError(f"{self.path} is damaged: its size has changed")
        if self.memory[: FACTS.size] != self._facts:
            raise ValueError(f"{self.path} is damaged: its header was overwritten")

    def give_up(self) -> int:
        """Cut the ring of a dead rank down to its header and close it. Return how many records are lost by that.

        The header counts them, until a collector has stored that count.
        """
        lost = max(0, self.begun - self.acknowledged)
        # Before the file is cut: a recorder that is killed here must not lose the count.
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


def _identity(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its identity is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: its identity is no object")
    return found
