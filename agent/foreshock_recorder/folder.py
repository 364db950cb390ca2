"""A run's folder: the lock that lets one recorder stand in it, and what is left behind in it."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import LOCK_NAME, make_private

LOG_NAME = "recorder.log"
_LOCK_SECONDS = 1.0
_STALE_SECONDS = 86400.0
_OURS = ("*.ring", "*.draft", f"{LOG_NAME}*", LOCK_NAME)
"""The lock last: whoever still finds it waits until the folder is empty."""


def lock(folder: Path, *, patience: float = _LOCK_SECONDS) -> int | None:
    """Make the folder and take its exclusive lock, until the descriptor is closed. None: another recorder has it."""
    deadline = time.monotonic() + patience
    while True:
        make_private(folder)
        path = folder / LOCK_NAME
        # A recorder that leaves takes the file along, and perhaps the folder: what was opened may be gone by now.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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


def tidy(folder: Path) -> None:
    """Leave nothing behind, unless another rank has come meanwhile. Call with the lock held."""
    if not any(folder.glob("*.ring")):
        _remove(folder, _OURS[2:])


def sweep(base: Path, *, keep: Path, now: float) -> list[str]:
    """Remove folders of runs that nobody has touched for a day and none of whose ranks lives; their names.

    now: Unix seconds.
    """
    swept = []
    for path in base.glob(f"*/{LOCK_NAME}"):
        folder = path.parent
        # A run that ends may take its folder along at any moment.
        with suppress(FileNotFoundError):
            if folder != keep and _untouched_since(folder) < now - _STALE_SECONDS:
                descriptor = lock(folder, patience=0.0)
                if descriptor is not None:
                    if not any(_alive(ring) for ring in folder.glob("*.ring")):
                        _remove(folder, _OURS)
                        swept.append(folder.name)
                    os.close(descriptor)
    return swept


def _untouched_since(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _alive(ring: Path) -> bool:
    try:
        reader = RingReader(ring)
    except (OSError, ValueError):
        return False
    try:
        return reader.alive
    finally:
        reader.close()


def _remove(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
