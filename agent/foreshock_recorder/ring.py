"""The flight recorder: one fixed-size ring of step records per rank, in shared memory, and how the probe writes it.

The probe writes it from the training thread, the recorder reads it from its own process (reader.py), and neither waits
for the other. The file outlives the rank, so the last steps before a crash are never lost.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from foreshock_recorder.layout import (
    BEGUN,
    BEGUN_PAYLOAD,
    COLUMNS_CHECKSUM,
    DROP_REASONS,
    ERROR_OFFSET,
    FACTS,
    HAS_LOSS,
    HAS_STEP,
    HISTORY,
    JSON_OFFSET,
    LAYOUT_VERSION,
    MAGIC,
    MEASURED_BEGIN,
    OBSERVED,
    OBSERVED_PAYLOAD,
    PROBLEM_OFFSET,
    WORD_BACKWARD_PASSES,
    WORD_BEGUN,
    WORD_DROPPED,
    WORD_EXIT_ACKNOWLEDGED,
    WORD_HEARTBEAT,
    WORD_HISTORY,
    WORD_IDLE,
    Layout,
    NormHistory,
    Part,
    RingFile,
)
from foreshock_recorder.paths import make_private
from foreshock_recorder.process import start_ticks


class Ring(RingFile):
    """The writing side, made by the probe. Every method but `create` takes microseconds and never waits."""

    def __init__(self, path: Path, memory: mmap.mmap, layout: Layout, descriptor: int, header: bytes) -> None:
        """descriptor: of the file. header: its first bytes, up to the end of the identity."""
        super().__init__(path, memory, layout)
        self._descriptor = descriptor
        self._header = header
        # The header has these too, and may be overwritten.
        self._newest = self._backward_passes = 0
        self._dropped = [0] * len(DROP_REASONS)
        memory[: len(header)] = header
        self._row = struct.Struct(f"<{layout.columns}d")

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any], *, layers: int, slot_count: int | None = None) -> Ring:
        """Make the file of one rank, with a complete header before another process can find it.

        `identity` is what `Hello` needs, as JSON. Raises `OSError` where the folder has no room.
        """
        text = json.dumps(identity).encode()
        layout = Layout(layers, len(text), slot_count)
        draft = path.with_suffix(".draft")
        descriptor = _open_new(draft)
        try:
            # A hole in shared memory kills the writer with SIGBUS once the memory runs out: take it all now.
            os.posix_fallocate(descriptor, 0, layout.file_bytes)
            memory = mmap.mmap(descriptor, layout.file_bytes)
            # Shows that this process lives, across containers too, and goes with it however it ends. A child by fork
            # has no part in it. Closing any other descriptor of the file in this process would release it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            draft.unlink()
            os.close(descriptor)
            raise
        pid = os.getpid()
        sizes = (layout.slot_bytes, layout.slot_count, layers, len(text))
        facts = FACTS.pack(MAGIC, LAYOUT_VERSION, COLUMNS_CHECKSUM, *sizes, pid, start_ticks(pid) or 0)
        ring = cls(path, memory, layout, descriptor, facts + bytes(JSON_OFFSET - FACTS.size) + text)
        # Not at the interpreter's exit: the exit reason may still have to be written.
        weakref.finalize(ring, os.close, descriptor).atexit = False
        draft.rename(path)
        return ring

    def begin_step(
        self, sequence: int, *, step: int, wall: float, monotonic: float, learning_rate: float, flags: int = 0
    ) -> None:
        """Write the begun part. It opens the record, so its other parts may follow in any order.

        flags: EDITED, NOT_STEPPED, GRADIENT_UNKNOWN.
        """
        self._ensure_whole()
        payload = BEGUN_PAYLOAD.pack(step, wall, monotonic, learning_rate, flags)
        slot = self.layout.slot_words[sequence % self.layout.slot_count]
        self._write(BEGUN, slot, sequence, payload)
        self._words[WORD_BEGUN] = self._newest = sequence

    def write_measured(self, sequence: int, row: Sequence[float]) -> None:
        """Write the measured part. row: `layout.columns` long."""
        slot = self.layout.slot_words[sequence % self.layout.slot_count]
        self._write(self.layout.measured, slot, sequence, self._row.pack(*row))

    def write_weights(self, sequence: int, blocks: Sequence[float]) -> None:
        """Write what a step has measured of the weights by layer, before its measured part. blocks: WEIGHT_BLOCKS."""
        payload = struct.pack(f"<{self.layout.weights.words}d", *blocks)
        self._write(self.layout.weights, self.layout.weights_word(sequence), sequence, payload)

    def open_measured(self, sequence: int) -> None:
        """Announce the measured part: before its row is written to `measured_offset`."""
        self._words[self.layout.word(sequence) + MEASURED_BEGIN] = sequence

    def open_weights(self, sequence: int) -> None:
        """Announce the weights: before a device writes them."""
        self._words[self.layout.weights_word(sequence)] = sequence

    def open_observed(self, sequence: int) -> None:
        """Announce the observed part: before a device writes it."""
        self._words[self.layout.word(sequence) + OBSERVED.begin] = sequence

    def measured_offset(self, sequence: int) -> int:
        """Byte offset in `memory` of the record's row of float64, `layout.columns` long."""
        return 8 * (self.layout.word(sequence) + MEASURED_BEGIN + 1)

    def close_measured(self, sequence: int) -> None:
        """Mark the measured part as whole: after its row has been written."""
        start = self.layout.word(sequence) + MEASURED_BEGIN + 1
        end = start + self.layout.columns
        self._words[end] = zlib.crc32(self._bytes[8 * start : 8 * end])
        self._words[end + 1] = sequence

    def write_observed(self, sequence: int, *, step: int | None, loss: float | None) -> None:
        """Write the observed part: what the script has passed to `observe`."""
        flags = (0 if step is None else HAS_STEP) | (0 if loss is None else HAS_LOSS)
        payload = OBSERVED_PAYLOAD.pack(step or 0, math.nan if loss is None else loss, flags)
        slot = self.layout.slot_words[sequence % self.layout.slot_count]
        self._write(OBSERVED, slot, sequence, payload)

    def count_backward_pass(self) -> None:
        """Count a backward pass that this rank has computed, before it waits for the other ranks."""
        self._ensure_whole()
        self._backward_passes += 1
        self._words[WORD_BACKWARD_PASSES] = self._backward_passes

    def count_dropped(self, reason: str) -> None:
        """Count a record that could not be written."""
        self._ensure_whole()
        place = DROP_REASONS.index(reason)
        self._dropped[place] += 1
        self._words[WORD_DROPPED + place] = self._dropped[place]

    def write_idle(self, idle: bool) -> None:
        """Record whether another training of this process steps, and this one does not."""
        self._words[WORD_EXIT_ACKNOWLEDGED] = 0
        self._words[WORD_IDLE] = idle

    def write_error(self, text: str) -> None:
        """Keep the probe's last internal error, for people."""
        self._write_text(ERROR_OFFSET, text)

    @property
    def exit_acknowledged(self) -> bool:
        """The collector has stored the exit reason too."""
        return bool(self._words[WORD_EXIT_ACKNOWLEDGED])

    @property
    def recorder_seen(self) -> float:
        """Monotonic time at which a recorder last polled the ring; 0.0 if none ever did."""
        return float(struct.unpack("<d", struct.pack("<Q", self._words[WORD_HEARTBEAT]))[0])

    @property
    def problem(self) -> str:
        """Why the recorder cannot reach the collector; empty while it can."""
        return self._read_text(PROBLEM_OFFSET)

    @property
    def history(self) -> NormHistory | None:
        """What the collector knows of the attempt that this one continues; None before it has answered."""
        if not self._words[WORD_HISTORY]:
            return None
        return NormHistory(*HISTORY.unpack_from(self.memory, 8 * (WORD_HISTORY + 1)))

    def _ensure_whole(self) -> None:
        """Give a file that somebody has cut or overwritten its size and header again.

        Access to memory beyond the end of its file would kill the training by SIGBUS. Raises `OSError` if there is no
        room.
        """
        # The size first: even a look at the header would.
        size = os.fstat(self._descriptor).st_size
        if size >= self.layout.file_bytes and self.memory[: FACTS.size] == self._header[: FACTS.size]:
            return
        os.posix_fallocate(self._descriptor, 0, self.layout.file_bytes)
        self.memory[FACTS.size : len(self._header)] = self._header[FACTS.size :]
        self._words[WORD_BEGUN] = self._newest
        self._words[WORD_BACKWARD_PASSES] = self._backward_passes
        for place, count in enumerate(self._dropped):
            self._words[WORD_DROPPED + place] = count
        # Last: a recorder that finds them finds a whole header.
        self.memory[: FACTS.size] = self._header[: FACTS.size]

    def _write(self, part: Part, slot: int, sequence: int, payload: bytes) -> None:
        """Write a part of a record. slot: its first word."""
        # The whole header once a step, by `begin_step`; the size each time.
        if os.fstat(self._descriptor).st_size < self.layout.file_bytes:
            self._ensure_whole()
        begin = slot + part.begin
        start, end = begin + 1, begin + 1 + part.words
        self._words[begin] = sequence
        self.memory[8 * start : 8 * end] = payload
        self._words[end] = zlib.crc32(payload)
        self._words[end + 1] = sequence


def _open_new(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    make_private(path.parent)
    path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        return os.open(path, flags, 0o600)
    # A recorder that left at this moment has removed the empty folder.
    make_private(path.parent)
    return os.open(path, flags, 0o600)
