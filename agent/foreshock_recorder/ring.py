"""The flight recorder: one fixed-size ring of step records per rank, in shared memory.

The probe writes it from the training thread, the recorder reads it from its own process, and neither waits for the
other. It outlives the rank, so the last steps before a crash are never lost. Standard library only: both share it.

A file is a header, then `slot_count` slots. Record n lies in slot n % slot_count. A slot has three
parts, each written at its own time and each between two copies of the record's sequence number:

    launched   step, wall time, monotonic time, learning rate     before the optimizer's step, on the host
    measured   DEVICE_COLUMNS, global layer norms, local layer norms   when the device has finished them
    observed   step, loss, which of the two are set               when the script has told them

The opening number is written first and the closing one last, so a reader that finds both equal, and the checksum
right, has the whole part. (A closing number alone let 1 % of reads through torn; the checksum is for reordered stores.)
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

MAGIC = b"FORESHK1"
LAYOUT_VERSION = 1
MAX_RING_BYTES = 4 * 2**20
"""A container often has 64 MB of shared memory for eight ranks."""
MAX_SLOTS = 4096

DEVICE_COLUMNS = (
    "loss_scale",
    "global_norm",
    "clip_coefficient",
    "local_norm",
    "global_nan_parameters",
    "global_inf_parameters",
    "local_nan_parameters",
    "local_inf_parameters",
    "first_nonfinite_global",
    "first_nonfinite_local",
    "skipped",
    "reduced_sequence",
    "reduced_square_sum",
    "reduced_nan_ranks",
    "reduced_inf_ranks",
    "reduced_idle_ranks",
    "reduced_loss_sum",
    "reduced_loss_count",
    "reduced_nan_losses",
    "reduced_inf_losses",
)
"""Named as in `StepBatch`, but for `skipped`, which travels as a flag."""

LOCK_NAME = "recorder.lock"
"""In a run's folder: the recorder holds an exclusive flock on it for as long as it lives."""

DROP_REASONS = ("probe_error", "ring_overrun")
"""Why a record may be missing: the probe failed on that step, or the ring was overwritten before it was read."""


class Farewell(IntEnum):
    """How a rank left. Numbered as `Goodbye.Reason`; NONE while it is there."""

    NONE = 0
    FINISHED = 1
    DETACHED = 2
    EXCEPTION = 3
    LOST = 4


class ReadOutcome(Enum):
    """Why `RingReader.read` has no record to give."""

    NOT_YET = "not yet"
    OVERRUN = "overrun"


# Header: fixed facts, then words that change while the ring is in use, then text and JSON.
_FACTS = struct.Struct("<8sIIIIIIQ")  # magic, version, slot bytes, slot count, layers, JSON bytes, pid, process start
_WORD_LAUNCHED, _WORD_ACKNOWLEDGED, _WORD_FAREWELL, _WORD_HEARTBEAT, _WORD_FLAGS, _WORD_DROPPED = 8, 9, 10, 11, 12, 16
_TEXT_BYTES = 384
_DETAIL_OFFSET, _TROUBLE_OFFSET = 256, 640
_JSON_OFFSET = 1024
_PAGE = 4096

# Slot: eight-byte words.
_LAUNCHED_BEGIN, _LAUNCHED_PAYLOAD, _LAUNCHED_WORDS = 0, 1, 5
_OBSERVED_BEGIN, _OBSERVED_PAYLOAD, _OBSERVED_WORDS = 8, 9, 3
_MEASURED_BEGIN, _MEASURED_PAYLOAD = 14, 15
_LAUNCHED = struct.Struct("<qdddQ")
_OBSERVED = struct.Struct("<qdQ")
_HAS_STEP, _HAS_LOSS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step of one rank, as read back."""

    sequence: int
    step: int
    wall_seconds: float
    monotonic_seconds: float
    learning_rate: float
    edited: bool
    """The script changed the gradients between backward and step."""
    measured: memoryview[float] | None
    """float64: DEVICE_COLUMNS, then global layer norms, then local ones. None: launched, never finished."""
    observed: bool
    """The observed part is written; without it, the script may still tell its loss."""
    loss: float | None


class _Layout:
    """Where things lie, given the number of layers."""

    def __init__(self, layers: int, identity_bytes: int, slot_count: int | None = None) -> None:
        self.layers = layers
        self.header_bytes = -(-(_JSON_OFFSET + identity_bytes) // _PAGE) * _PAGE
        self.columns = len(DEVICE_COLUMNS) + 2 * layers
        # begin, payload, checksum, end
        self.slot_words = _MEASURED_PAYLOAD + self.columns + 2
        self.slot_bytes = 8 * self.slot_words
        fitting = MAX_RING_BYTES // self.slot_bytes
        self.slot_count = slot_count or max(64, min(MAX_SLOTS, fitting))
        self.file_bytes = self.header_bytes + self.slot_count * self.slot_bytes

    def word(self, sequence: int) -> int:
        """Index of the first word of a record's slot."""
        return (self.header_bytes + (sequence % self.slot_count) * self.slot_bytes) // 8


class Ring:
    """The writing side. Made by the probe; every method but `create` takes microseconds and never waits."""

    def __init__(self, path: Path, memory: mmap.mmap, layout: _Layout) -> None:
        self.path = path
        self.layout = layout
        self.memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any], *, layers: int, slot_count: int | None = None) -> Ring:
        """Make the file of one rank, complete with its header before anybody can find it.

        `identity` is what `Hello` needs, as JSON. Raises `OSError` where the folder has no room.
        """
        text = json.dumps(identity).encode()
        layout = _Layout(layers, len(text), slot_count)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(".draft")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # A hole in shared memory kills the writer with SIGBUS once the memory runs out: take it all now.
            os.posix_fallocate(descriptor, 0, layout.file_bytes)
            memory = mmap.mmap(descriptor, layout.file_bytes)
        except OSError:
            draft.unlink()
            raise
        finally:
            os.close(descriptor)
        ring = cls(path, memory, layout)
        pid = os.getpid()
        facts = (MAGIC, LAYOUT_VERSION, layout.slot_bytes, layout.slot_count, layers, len(text), pid)
        _FACTS.pack_into(memory, 0, *facts, process_start(pid) or 0)
        memory[_JSON_OFFSET : _JSON_OFFSET + len(text)] = text
        draft.rename(path)
        return ring

    def launch(
        self, sequence: int, *, step: int, wall: float, monotonic: float, learning_rate: float, edited: bool
    ) -> None:
        """Write that a step begins. Opens the record, so its other parts may follow in any order."""
        payload = (step, wall, monotonic, learning_rate, int(edited))
        self._write(_LAUNCHED_BEGIN, _LAUNCHED_PAYLOAD, _LAUNCHED_WORDS, sequence, _LAUNCHED.pack(*payload))
        self._words[_WORD_LAUNCHED] = sequence

    def open_measured(self, sequence: int) -> None:
        """Announce the measured part: call before the row is copied to `measured_offset`."""
        self._words[self.layout.word(sequence) + _MEASURED_BEGIN] = sequence

    def measured_offset(self, sequence: int) -> int:
        """Byte offset in `memory` of the record's row of float64, `layout.columns` long."""
        return 8 * (self.layout.word(sequence) + _MEASURED_PAYLOAD)

    def close_measured(self, sequence: int) -> None:
        """The row is whole."""
        self._close(sequence, _MEASURED_PAYLOAD, self.layout.columns)

    def observe(self, sequence: int, *, step: int | None, loss: float | None) -> None:
        """Write what the script told about a step."""
        flags = (0 if step is None else _HAS_STEP) | (0 if loss is None else _HAS_LOSS)
        payload = _OBSERVED.pack(step or 0, math.nan if loss is None else loss, flags)
        self._write(_OBSERVED_BEGIN, _OBSERVED_PAYLOAD, _OBSERVED_WORDS, sequence, payload)

    def drop(self, reason: str) -> None:
        """Count a record that could not be written."""
        self._words[_WORD_DROPPED + DROP_REASONS.index(reason)] += 1

    def farewell(self, reason: Farewell, detail: str = "") -> None:
        """Say goodbye; the recorder sends what is left and lets go of the ring."""
        self.note(detail)
        self._words[_WORD_FAREWELL] = reason

    def note(self, detail: str) -> None:
        """Keep a line of text for people: the last internal error, or why the rank left."""
        _write_text(self.memory, _DETAIL_OFFSET, detail)

    @property
    def launched(self) -> int:
        """The newest record's sequence number; 0 before the first."""
        return self._words[_WORD_LAUNCHED]

    @property
    def acknowledged(self) -> int:
        """The highest sequence number that a collector has stored."""
        return self._words[_WORD_ACKNOWLEDGED]

    @property
    def acknowledged_farewell(self) -> bool:
        """The collector has stored the goodbye too."""
        return bool(self._words[_WORD_FLAGS] & 1)

    @property
    def recorder_seen(self) -> float:
        """Monotonic time at which a recorder last looked; 0.0 if none ever did."""
        return float(struct.unpack("<d", struct.pack("<Q", self._words[_WORD_HEARTBEAT]))[0])

    @property
    def trouble(self) -> str:
        """Why the recorder cannot reach the collector; empty while it can."""
        return _read_text(self.memory, _TROUBLE_OFFSET)

    def _write(self, begin: int, payload: int, length: int, sequence: int, data: bytes) -> None:
        first = self.layout.word(sequence)
        self._words[first + begin] = sequence
        start = 8 * (first + payload)
        self.memory[start : start + 8 * length] = data
        self._close(sequence, payload, length)

    def _close(self, sequence: int, payload: int, length: int) -> None:
        start = self.layout.word(sequence) + payload
        self._words[start + length] = zlib.crc32(self._bytes[8 * start : 8 * (start + length)])
        self._words[start + length + 1] = sequence


class RingReader:
    """The reading side. Raises `ValueError` for a file that is no ring of this layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        if len(self._memory) < _JSON_OFFSET:
            raise ValueError(f"{path} is no ring: it is shorter than a header")
        facts = _FACTS.unpack_from(self._memory, 0)
        magic, version, _, slots, layers, text, self.pid, self.process_start = facts
        if magic != MAGIC or version != LAYOUT_VERSION:
            raise ValueError(f"{path} is not a ring of layout {LAYOUT_VERSION}: made by another version of foreshock?")
        self.layout = _Layout(layers, text, slots)
        self.identity: dict[str, Any] = json.loads(self._memory[_JSON_OFFSET : _JSON_OFFSET + text])
        self._bytes = memoryview(self._memory)
        self._words = self._bytes.cast("Q")

    def read(self, sequence: int) -> Record | ReadOutcome:
        """The record, as far as it is written. NOT_YET: not launched. OVERRUN: a newer one has taken its slot."""
        if sequence > self.launched:
            return ReadOutcome.NOT_YET
        if sequence <= self.launched - self.layout.slot_count:
            return ReadOutcome.OVERRUN
        launched = self._part(sequence, _LAUNCHED_BEGIN, _LAUNCHED_PAYLOAD, _LAUNCHED_WORDS)
        if launched is None:
            return ReadOutcome.OVERRUN
        step, wall, monotonic, learning_rate, edited = _LAUNCHED.unpack(launched)
        observed = self._part(sequence, _OBSERVED_BEGIN, _OBSERVED_PAYLOAD, _OBSERVED_WORDS)
        loss = None
        if observed is not None:
            told_step, told_loss, flags = _OBSERVED.unpack(observed)
            step = told_step if flags & _HAS_STEP else step
            loss = told_loss if flags & _HAS_LOSS else None
        measured = self._part(sequence, _MEASURED_BEGIN, _MEASURED_PAYLOAD, self.layout.columns)
        return Record(
            sequence=sequence,
            step=step,
            wall_seconds=wall,
            monotonic_seconds=monotonic,
            learning_rate=learning_rate,
            edited=bool(edited),
            measured=None if measured is None else memoryview(measured).cast("d"),
            observed=observed is not None,
            loss=loss,
        )

    def acknowledge(self, sequence: int, *, farewell: bool = False) -> None:
        """Tell the rank, and a recorder that may follow, how far the collector has stored."""
        self._words[_WORD_ACKNOWLEDGED] = sequence
        if farewell:
            self._words[_WORD_FLAGS] |= 1

    def trouble(self, text: str) -> None:
        """Tell the rank why the collector cannot be reached; empty: it can."""
        _write_text(self._memory, _TROUBLE_OFFSET, text)

    def heartbeat(self, monotonic: float) -> None:
        """Tell the rank that a recorder is looking."""
        self._words[_WORD_HEARTBEAT] = struct.unpack("<Q", struct.pack("<d", monotonic))[0]

    @property
    def launched(self) -> int:
        """The newest record's sequence number; 0 before the first."""
        return self._words[_WORD_LAUNCHED]

    @property
    def acknowledged(self) -> int:
        """The highest sequence number that a collector has stored."""
        return self._words[_WORD_ACKNOWLEDGED]

    @property
    def farewell(self) -> Farewell:
        """How the rank left, NONE while it has not said."""
        return Farewell(self._words[_WORD_FAREWELL])

    @property
    def detail(self) -> str:
        """The line of text that the rank left."""
        return _read_text(self._memory, _DETAIL_OFFSET)

    @property
    def dropped(self) -> dict[str, int]:
        """Records that the probe could not write, by reason, since the attach; reasons without any are left out."""
        counts = {reason: self._words[_WORD_DROPPED + i] for i, reason in enumerate(DROP_REASONS)}
        return {reason: count for reason, count in counts.items() if count}

    @property
    def alive(self) -> bool:
        """The process that made the ring still runs: the same pid, started at the same time."""
        return bool(process_start(self.pid) == self.process_start)

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        self._words.release()
        self._bytes.release()
        self._memory.close()

    def _part(self, sequence: int, begin: int, payload: int, length: int) -> bytes | None:
        first = self.layout.word(sequence)
        start = first + payload
        if self._words[start + length + 1] != sequence:
            return None
        data = bytes(self._bytes[8 * start : 8 * (start + length)])
        whole = self._words[first + begin] == sequence and self._words[start + length] == zlib.crc32(data)
        return data if whole else None


def _write_text(memory: mmap.mmap, offset: int, text: str) -> None:
    data = text.encode(errors="replace")[: _TEXT_BYTES - 1]
    memory[offset : offset + len(data) + 1] = data + b"\0"


def _read_text(memory: mmap.mmap, offset: int) -> str:
    return memory[offset : offset + _TEXT_BYTES].split(b"\0", 1)[0].decode(errors="replace")


def ring_folder(run: str) -> Path:
    """Where a run's rings lie on this machine: FORESHOCK_RING_DIR, or shared memory, or the temporary folder."""
    base = os.environ.get("FORESHOCK_RING_DIR")
    if not base:
        memory = Path("/dev/shm")  # noqa: S108 - shared memory is the point
        root = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        base = str(root / f"foreshock-{os.getuid()}")
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in run).lstrip(".")
    # Two names that only differ in what was replaced must not share a folder.
    suffix = "" if safe == run else f"-{zlib.crc32(run.encode()):08x}"
    return Path(base) / f"{safe}{suffix}"


def ring_name(launch: str, rank: int) -> str:
    """File name of one rank's ring."""
    return f"{launch}-rank-{rank:05d}.ring"


def process_start(pid: int) -> int | None:
    """Clock ticks after boot at which a process started; None if there is no such process, or only its corpse."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may itself hold parentheses and spaces: fields count from the last one.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
