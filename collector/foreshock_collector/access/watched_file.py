"""Files that are read again when they change, so that nothing has to be restarted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_CHECK_SECONDS = 1.0
"""Every stream asks at each acknowledgement, and every request: most of them must not touch the disk."""


class WatchedFiles:
    """Notices that one of some files has changed. monotonic: returns seconds."""

    def __init__(self, *paths: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._paths = paths
        self._monotonic = monotonic
        self._seen = self._versions()
        self._checked = monotonic()

    def changed(self) -> bool:
        """Return whether a file has changed since this last was true. Looks about once a second."""
        now = self._monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return False
        self._checked = now
        versions = self._versions()
        changed, self._seen = versions != self._seen, versions
        return changed

    def _versions(self) -> list[tuple[int, int, int] | None]:
        return [_version(path) for path in self._paths]


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
