"""Where the rings of a machine lie, and whether a recorder serves a folder of them."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

LOCK_NAME = "recorder.lock"
"""In a launch's folder: its recorder holds an exclusive flock on it for as long as it lives."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - shared memory is the point
_NAME_LENGTH = 100
_MAKE_ATTEMPTS = 3


def ring_base(base: str = "") -> Path:
    """Return the folder of all rings of this user: `base`, FORESHOCK_RING_DIR, shared memory or the temporary one."""
    base = base or os.environ.get("FORESHOCK_RING_DIR", "")
    if base:
        return Path(base)
    return SHARED_MEMORY / _user_folder() if os.access(SHARED_MEMORY, os.W_OK) else temporary_base()


def temporary_base() -> Path:
    """Return the folder of this user's rings where there is no room in shared memory."""
    return Path(tempfile.gettempdir()) / _user_folder()


def run_folder(run: str, base: str = "") -> Path:
    """Return the folder that a run's launches have their folders in on this machine."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in run).lstrip(".")[:_NAME_LENGTH]
    # Two names that only differ in what was replaced must not share a folder.
    suffix = "" if safe == run else f"-{zlib.crc32(run.encode(errors='replace')):08x}"
    return ring_base(base) / f"{safe}{suffix}"


def ring_folder(run: str, launch: str, base: str = "") -> Path:
    """Return the folder of one launch's rings: its ranks share a recorder, and an address, with no other launch."""
    return run_folder(run, base) / launch


def ring_name(launch: str, rank: int) -> str:
    """Return the file name of one rank's ring."""
    return f"{launch}-rank-{rank:05d}.ring"


def has_recorder(folder: Path) -> bool:
    """Return whether a recorder holds the lock of this launch's folder or, as a side-car, that of its run's."""
    return any(_held(each / LOCK_NAME) for each in (folder, folder.parent))


def _held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        # Shared: two ranks that probe at once must not take each other for a recorder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def make_private(folder: Path) -> None:
    """Make a launch's folder, and the folders above it, for this user only.

    Raises `OSError` if that fails, or if one of the folders that belong to the user alone is a link or is owned by
    another user.
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
        # A recorder that left at this moment has removed the empty folder above.
    raise FileNotFoundError(f"{folder} cannot be made")


def _user_folder() -> str:
    return f"foreshock-{os.getuid()}"
