"""The folder of a launch's rings: the lock that lets a single recorder serve it, and what the folder holds."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from foreshock_recorder.paths import LOCK_NAME, make_private
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import ReadOutcome

LOG_NAME = "recorder.log"
STACK_SUFFIX = ".stack"
"""Suffix of the file beside a ring that a rank writes its stack to when it gets SIGTERM."""
_LOCK_SECONDS = 1.0
_RINGS = ("*.ring", "*.draft")
_BESIDE = (f"*{STACK_SUFFIX}", f"{LOG_NAME}*", LOCK_NAME)
"""Removed in this order. The lock comes last: a recorder that still finds it waits until the folder is empty."""


def lock(folder: Path, *, patience: float = _LOCK_SECONDS) -> int | None:
    """Make the folder and take its exclusive lock, until the descriptor is closed. None: another recorder has it."""
    deadline = time.monotonic() + patience
    while True:
        make_private(folder)
        path = folder / LOCK_NAME
        # A recorder that leaves removes the file, and perhaps the folder: what was opened may be gone by now.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if path.stat().st_ino == os.fstat(descriptor).st_ino:
                        return descriptor
            os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        # Ranks that probe for a recorder hold it for a moment.
        time.sleep(0.05)


def release(folder: Path, held: int) -> None:
    """Release the lock. Remove the folder, unless rings are left, or another rank has come meanwhile."""
    try:
        if not has_rings(folder):
            _remove(folder, _BESIDE)
    finally:
        os.close(held)


def has_rings(folder: Path) -> bool:
    """Return whether a folder holds a ring, or one that a rank is making."""
    return any(path for pattern in _RINGS for path in folder.glob(pattern))


def remove(folder: Path) -> None:
    """Remove our files from a folder whose lock is held; then the folder and its run's, if they are empty."""
    _remove(folder, (*_RINGS, *_BESIDE))


def _remove(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Sums up the readable rings of a folder."""

    folder: Path
    run: str
    """Name of the run that the ranks asked for."""
    collector: str
    """Address that the ranks were given; empty: this machine."""
    ranks: int
    alive: bool
    """True while a rank runs."""
    unacknowledged: int
    """Records that no collector has acknowledged."""
    newest: float
    """Unix seconds of the last record, or of the last change to a file."""
    full_bytes: int
    """Size of the rings that have not been given up."""


def paths_below(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that match. A folder that is removed meanwhile is passed over, where `Path.glob` raises."""
    return [folder / name for name in glob(pattern, root_dir=folder)]  # noqa: PTH207


def contents(folder: Path) -> Contents | None:
    """Read a folder without its lock: it may be removed meanwhile. None: no ring in it can be read."""
    run = collector = ""
    ranks = unacknowledged = full_bytes = 0
    newest, alive = 0.0, False
    for path in paths_below(folder, "*.ring"):
        try:
            reader = RingReader(path)
        except (OSError, ValueError):
            continue
        last = reader.read(reader.begun)
        # By its descriptor: a recorder that has delivered the ring may just have removed the file.
        newest = max(newest, reader.modified, 0.0 if isinstance(last, ReadOutcome) else last.wall_seconds)
        run, collector = str(reader.identity.get("run", "")), str(reader.identity.get("collector", ""))
        alive |= reader.alive
        unacknowledged += max(0, reader.begun - reader.acknowledged)
        full_bytes += 0 if reader.given_up else reader.layout.file_bytes
        ranks += 1
        reader.close()
    if not ranks:
        return None
    return Contents(
        folder=folder,
        run=run,
        collector=collector,
        ranks=ranks,
        alive=alive,
        unacknowledged=unacknowledged,
        newest=newest,
        full_bytes=full_bytes,
    )
