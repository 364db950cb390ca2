"""The flight recorder: one fixed-size ring of step records per rank, in shared memory.

The probe writes it from the training thread, the recorder reads it from its own process, and neither waits for the
other. It outlives the rank, so the last steps before a crash are never lost. This module is the layout and the writing
side, standard library only: all that the probe knows of the recorder. The reading side is reader.py.

A file is a header, then `slot_count` slots. Record n lies in slot n % slot_count. A slot has three
parts, each written at its own time and each between two copies of the record's sequence number:

    launched   step, wall time, monotonic time, learning rate, flags   before the optimizer's step, on the host
    measured   DEVICE_COLUMNS, global layer norms, local layer norms   when the device has finished them
    observed   step, loss, which of the two are set               when the script has told them

The opening number is written first and the closing one last, so a reader that finds both equal, and the checksum
right, has the whole part. (A single closing number let 1 % of reads through torn; the checksum is for processors that
reorder stores, and costs about a microsecond per kilobyte.) Measured parts are written in the order of their records,
so one that is missing below the newest will never come.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import stat
import struct
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"FORESHK1"
LAYOUT_VERSION = 5
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
    "parameter_fingerprint",
    "parameter_norm",
    "update_ratio",
    "gradient_absolute_maximum",
    "shadow",
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
"""Named as in `StepBatch`, but for `skipped` and `shadow` (1: would have been clipped, 2: skipped), which travel as
flags."""

LOCK_NAME = "recorder.lock"
"""In a launch's folder: its recorder holds an exclusive flock on it for as long as it lives."""

DROP_REASONS = ("probe_error", "ring_overrun", "given_up")
"""Why a record may be missing: the probe failed on that step; the ring was overwritten before it was read; or no
collector took it for so long that the ring was removed."""
_NAME_LENGTH = 100
_MAKE_ATTEMPTS = 3


class Farewell(IntEnum):
    """How a rank left. Numbered as `Goodbye.Reason`; NONE while it is there."""

    NONE = 0
    FINISHED = 1
    DETACHED = 2
    EXCEPTION = 3
    LOST = 4
    INTERRUPTED = 5


# Header: fixed facts, then words that change while the ring is in use, then text and JSON.
FACTS = struct.Struct("<8sIIIIIIQ")  # magic, version, slot bytes, slot count, layers, JSON bytes, pid, process start
WORD_LAUNCHED, WORD_MEASURED, WORD_ACKNOWLEDGED, WORD_ACKNOWLEDGED_FAREWELL = 8, 9, 10, 11
WORD_FAREWELL, WORD_HEARTBEAT, WORD_BACKWARD_PASSES, WORD_DROPPED = 12, 13, 14, 16
TEXT_BYTES = 256
NOTE_OFFSET, TROUBLE_OFFSET, FAREWELL_OFFSET, PAGE_OFFSET = 256, 512, 768, 1024
JSON_OFFSET = 1280
_PAGE = 4096


class Part(NamedTuple):
    """Where a part lies in its slot, in words of eight bytes: begin marker, payload, checksum, end marker."""

    begin: int
    words: int
    """Of the payload."""


LAUNCHED = Part(0, 5)
OBSERVED = Part(8, 3)
_MEASURED_BEGIN = 14
LAUNCHED_PAYLOAD = struct.Struct("<qdddQ")
OBSERVED_PAYLOAD = struct.Struct("<qdQ")
HAS_STEP, HAS_LOSS = 1, 2
EDITED, NOT_STEPPED, GRADIENT_UNKNOWN = 1, 2, 4
"""Flags of a launched part."""


class Layout:
    """Where things lie, given the number of layers."""

    def __init__(self, layers: int, identity_bytes: int, slot_count: int | None = None) -> None:
        self.layers = layers
        self.header_bytes = -(-(JSON_OFFSET + identity_bytes) // _PAGE) * _PAGE
        self.columns = len(DEVICE_COLUMNS) + 2 * layers
        self.measured = Part(_MEASURED_BEGIN, self.columns)
        self.slot_bytes = 8 * (_MEASURED_BEGIN + self.columns + 3)
        fitting = MAX_RING_BYTES // self.slot_bytes
        self.slot_count = slot_count or max(64, min(MAX_SLOTS, fitting))
        self.file_bytes = self.header_bytes + self.slot_count * self.slot_bytes

    def word(self, sequence: int) -> int:
        """Index of the first word of a record's slot."""
        return (self.header_bytes + (sequence % self.slot_count) * self.slot_bytes) // 8


class Side:
    """What both sides see of the file."""

    def __init__(self, path: Path, memory: mmap.mmap, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.memory = memory
        self._bytes = memoryview(memory)
        self._row = struct.Struct(f"<{layout.columns}d")
        self._words = self._bytes.cast("Q")

    @property
    def launched(self) -> int:
        """The newest record's sequence number; 0 before the first."""
        return self._words[WORD_LAUNCHED]

    @property
    def measured(self) -> int:
        """The newest record whose measured part is whole; 0 before the first."""
        return self._words[WORD_MEASURED]

    @property
    def acknowledged(self) -> int:
        """The highest sequence number that a collector has stored."""
        return self._words[WORD_ACKNOWLEDGED]

    def _write_farewell(self, reason: Farewell, detail: str) -> None:
        self._write_text(FAREWELL_OFFSET, detail)
        self._words[WORD_FAREWELL] = reason

    def _write_text(self, offset: int, text: str) -> None:
        data = text.encode(errors="replace")[: TEXT_BYTES - 1]
        self.memory[offset : offset + len(data) + 1] = data + b"\0"

    def _read_text(self, offset: int) -> str:
        return self.memory[offset : offset + TEXT_BYTES].split(b"\0", 1)[0].decode(errors="replace")


class Ring(Side):
    """The writing side. Made by the probe; every method but `create` takes microseconds and never waits."""

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any], *, layers: int, slot_count: int | None = None) -> Ring:
        """Make the file of one rank, complete with its header before anybody can find it.

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
            # Says that this process lives, across containers too, and goes with it however it ends. A child by fork
            # has no part in it. Closing any other descriptor of the file in this process would end it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            draft.unlink()
            os.close(descriptor)
            raise
        ring = cls(path, memory, layout)
        # Not at the interpreter's exit: there may be a goodbye to come.
        weakref.finalize(ring, os.close, descriptor).atexit = False
        pid = os.getpid()
        facts = (MAGIC, LAYOUT_VERSION, layout.slot_bytes, layout.slot_count, layers, len(text), pid)
        FACTS.pack_into(memory, 0, *facts, process_start(pid) or 0)
        memory[JSON_OFFSET : JSON_OFFSET + len(text)] = text
        draft.rename(path)
        return ring

    def launch(
        self, sequence: int, *, step: int, wall: float, monotonic: float, learning_rate: float, flags: int = 0
    ) -> None:
        """Write that a step begins. Opens the record, so its other parts may follow in any order.

        flags: EDITED, NOT_STEPPED, GRADIENT_UNKNOWN.
        """
        payload = LAUNCHED_PAYLOAD.pack(step, wall, monotonic, learning_rate, flags)
        self._write(LAUNCHED, sequence, payload)
        self._words[WORD_LAUNCHED] = sequence

    def measure(self, sequence: int, row: Sequence[float]) -> None:
        """Write the measured part. row: `layout.columns` long."""
        self.open_measured(sequence)
        self._row.pack_into(self.memory, self.measured_offset(sequence), *row)
        self.close_measured(sequence)

    def open_measured(self, sequence: int) -> None:
        """Announce the measured part: before its row is written to `measured_offset`."""
        self._words[self.layout.word(sequence) + _MEASURED_BEGIN] = sequence

    def measured_offset(self, sequence: int) -> int:
        """Byte offset in `memory` of the record's row of float64, `layout.columns` long."""
        return 8 * (self.layout.word(sequence) + _MEASURED_BEGIN + 1)

    def close_measured(self, sequence: int) -> None:
        """The row is whole."""
        self._close(self.layout.measured, sequence)
        self._words[WORD_MEASURED] = sequence

    def observe(self, sequence: int, *, step: int | None, loss: float | None) -> None:
        """Write what the script told about a step."""
        flags = (0 if step is None else HAS_STEP) | (0 if loss is None else HAS_LOSS)
        payload = OBSERVED_PAYLOAD.pack(step or 0, math.nan if loss is None else loss, flags)
        self._write(OBSERVED, sequence, payload)

    def backward_passed(self) -> None:
        """Count a backward pass that this rank has computed, before it waits for the others'."""
        self._words[WORD_BACKWARD_PASSES] += 1

    def drop(self, reason: str) -> None:
        """Count a record that could not be written."""
        self._words[WORD_DROPPED + DROP_REASONS.index(reason)] += 1

    def farewell(self, reason: Farewell, detail: str = "") -> None:
        """Say goodbye; the recorder sends what is left and lets go of the ring."""
        self._write_farewell(reason, detail)

    def note(self, detail: str) -> None:
        """Keep a line of text for people: the last internal error."""
        self._write_text(NOTE_OFFSET, detail)

    @property
    def acknowledged_farewell(self) -> bool:
        """The collector has stored the goodbye too."""
        return bool(self._words[WORD_ACKNOWLEDGED_FAREWELL])

    @property
    def recorder_seen(self) -> float:
        """Monotonic time at which a recorder last looked; 0.0 if none ever did."""
        return float(struct.unpack("<d", struct.pack("<Q", self._words[WORD_HEARTBEAT]))[0])

    @property
    def trouble(self) -> str:
        """Why the recorder cannot reach the collector; empty while it can."""
        return self._read_text(TROUBLE_OFFSET)

    @property
    def page(self) -> str:
        """Address of the run's page at the collector; empty before it has answered."""
        return self._read_text(PAGE_OFFSET)

    def _write(self, part: Part, sequence: int, payload: bytes) -> None:
        begin = self.layout.word(sequence) + part.begin
        self._words[begin] = sequence
        start = 8 * (begin + 1)
        self.memory[start : start + 8 * part.words] = payload
        self._close(part, sequence)

    def _close(self, part: Part, sequence: int) -> None:
        start = self.layout.word(sequence) + part.begin + 1
        end = start + part.words
        self._words[end] = zlib.crc32(self._bytes[8 * start : 8 * end])
        self._words[end + 1] = sequence


def ring_base(base: str = "") -> Path:
    """Where all rings of this user lie: `base`, FORESHOCK_RING_DIR, shared memory or the temporary folder."""
    base = base or os.environ.get("FORESHOCK_RING_DIR", "")
    if base:
        return Path(base)
    memory = Path("/dev/shm")  # noqa: S108 - shared memory is the point
    return (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())) / _user_folder()


def run_folder(run: str, base: str = "") -> Path:
    """Where a run's launches have their folders on this machine."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in run).lstrip(".")[:_NAME_LENGTH]
    # Two names that only differ in what was replaced must not share a folder.
    suffix = "" if safe == run else f"-{zlib.crc32(run.encode(errors='replace')):08x}"
    return ring_base(base) / f"{safe}{suffix}"


def ring_folder(run: str, launch: str, base: str = "") -> Path:
    """Where the rings of one launch lie: its ranks share a recorder, and an address, with no other."""
    return run_folder(run, base) / launch


def has_recorder(folder: Path) -> bool:
    """A recorder holds the lock of this launch's folder; or, as a side-car, that of its run's."""
    return any(_held(each / LOCK_NAME) for each in (folder, folder.parent))


def _held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        # Shared: two ranks that look at once must not take each other for a recorder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _user_folder() -> str:
    return f"foreshock-{os.getuid()}"


def _open_new(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    make_private(path.parent)
    path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        return os.open(path, flags, 0o600)
    # A recorder that left at this moment has taken the empty folder along.
    make_private(path.parent)
    return os.open(path, flags, 0o600)


def make_private(folder: Path) -> None:
    """Make a launch's folder, and those above it, for our user only.

    Raises `OSError` if it cannot be, or if it or one of those that are ours alone is a link or somebody else's.
    """
    _make(folder)
    ours = [folder, folder.parent, *(each for each in folder.parents[1:2] if each.name == _user_folder())]
    for each in ours:
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{each} is not a folder")
        if found.st_uid not in (os.getuid(), 0):
            raise PermissionError(f"{each} belongs to another user")


def _make(folder: Path) -> None:
    for _ in range(_MAKE_ATTEMPTS):
        if not folder.parent.exists():
            _make(folder.parent)
        with suppress(FileNotFoundError):
            return folder.mkdir(mode=0o700, exist_ok=True)
        # A recorder that left at this moment has taken the empty folder above along.
    raise FileNotFoundError(f"{folder} cannot be made")


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
