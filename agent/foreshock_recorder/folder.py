"""The folder of a launch's rings: the lock that lets one recorder stand in it, and what lies there."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from foreshock_recorder.reader import ReadOutcome, RingReader
from foreshock_recorder.ring import LOCK_NAME, make_private

LOG_NAME = "recorder.log"
STACK_SUFFIX = ".stack"
"""Of the file beside a ring in which a rank that is sent SIGTERM leaves its stack."""
_LOCK_SECONDS = 1.0
_RINGS = ("*.ring", "*.draft")
_BESIDE = (f"*{STACK_SUFFIX}", f"{LOG_NAME}*", LOCK_NAME)
"""The lock last: whoever still finds it waits until the folder is empty."""


def lock(folder: Path, *, patience: float = _LOCK_SECONDS) -> int | None:
    """Make the folder and take its exclusive lock, until the descriptor is closed. None: another recorder has it."""
    deadline = time.monotonic() + patience
    while True:
        make_private(folder)
        path = folder / LOCK_NAME
        # A recorder that leaves takes the file along, and perhaps the folder: what was opened may be gone by now.
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
        # Ranks that look whether a recorder is there hold it for a moment.
        time.sleep(0.05)


def release(folder: Path, held: int) -> None:
    """Give the lock back. Leave nothing behind, unless rings are left, or another rank has come meanwhile."""
    try:
        if not any(path for pattern in _RINGS for path in folder.glob(pattern)):
            _remove(folder, _BESIDE)
    finally:
        os.close(held)


def remove(folder: Path) -> None:
    """Remove all of ours from a folder whose lock is held; then the folder and its run's, if they are empty."""
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
    """What the readable rings of a folder hold."""

    folder: Path
    run: str
    """Name of the run that the ranks asked for."""
    collector: str
    """Address that the ranks were told; empty: this machine."""
    ranks: int
    alive: bool
    """A rank still runs."""
    unstored: int
    """Records that no collector has acknowledged."""
    newest: float
    """Unix seconds: of the last record, or change."""
    full_bytes: int
    """Size of the rings that have not been given up."""


def paths_below(folder: Path, pattern: str) -> list[Path]:
    """Those that match; a folder that is removed meanwhile is passed over, where `Path.glob` raises."""
    return [folder / name for name in glob(pattern, root_dir=folder)]  # noqa: PTH207


def contents(folder: Path) -> Contents | None:
    """Look into a folder without its lock: it may be removed meanwhile. None: there is no ring that can be read."""
    run = collector = ""
    ranks = unstored = full_bytes = 0
    newest, alive = 0.0, False
    for path in paths_below(folder, "*.ring"):
        try:
            reader = RingReader(path)
        except (OSError, ValueError):
            continue
        last = reader.read(reader.launched)
        # By its descriptor: whoever has handed it in may just have removed the file.
        newest = max(newest, reader.changed, 0.0 if isinstance(last, ReadOutcome) else last.wall_seconds)
        run, collector = str(reader.identity.get("run", "")), str(reader.identity.get("collector", ""))
        alive |= reader.alive
        unstored += max(0, reader.launched - reader.acknowledged)
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
        unstored=unstored,
        newest=newest,
        full_bytes=full_bytes,
    )
