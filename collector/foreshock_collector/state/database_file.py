"""The file of a database: locked by one collector, watched while it is in use, set aside when it is damaged."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
_APPLICATION_OFFSET = 68
APPLICATION = 0x464F5245
""""FORE", the `application_id` of SQLite's header (https://www.sqlite.org/fileformat.html#application_id)."""
_BESIDE = ("", "-wal", "-shm")
"""Suffixes of the files that belong together."""


class StoreError(ValueError):
    """The file is not a database that this collector can use."""


class DamagedError(StoreError):
    """The file is a collector's database, and parts of it cannot be read."""


class GoneError(Exception):
    """The file was removed or replaced while it was in use: what is written no longer reaches it."""


class DatabaseFile:
    """Holds a file, created if it does not exist, for one collector. Raises `StoreError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"database {path} cannot be written: {error.strerror}") from error
        try:
            # On the file itself: links of any kind lead to the same lock, and it ends with the process.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise StoreError(
                f"database {path} is in use by another collector; stop that one or give another path"
            ) from None

    def check(self) -> None:
        """Raise `GoneError` if the path no longer leads to this file."""
        ours = os.fstat(self._descriptor)
        try:
            found = self._path.stat()
        except OSError:
            raise GoneError(f"database {self._path} was removed") from None
        if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            raise GoneError(f"database {self._path} was replaced")

    def close(self) -> None:
        """Release the lock. SQLite must have closed the file: this would release its locks as well."""
        os.close(self._descriptor)


def is_collectors(path: Path) -> bool:
    """Return whether the file begins as a collector's database does, whatever follows."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    application = int.from_bytes(header[_APPLICATION_OFFSET : _APPLICATION_OFFSET + 4], "big")
    return header.startswith(_MAGIC) and application == APPLICATION


def set_aside(path: Path) -> Path:
    """Rename a database that nobody uses, with the files beside it. Return its new path."""
    target = next(
        found
        for number in itertools.count(1)
        if not (found := path.with_name(f"{path.name}.damaged-{number}")).exists()
    )
    for suffix in _BESIDE:
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(target.with_name(target.name + suffix))
    return target
