"""Rings whose ranks have gone before a collector took all they hold: kept for a later recorder, within limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from foreshock_recorder.folder import Contents, contents, lock, paths_below, release, remove
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import LOCK_NAME

KEPT_SECONDS = 86400.0
"""Age of its newest record at which a launch's records are given up."""
KEPT_BYTES = 512 * 2**20
"""Rings that are kept for later, all together ..."""
KEPT_SHARE = 1 / 4
"""... and no more than this part of their file system."""
COUNTED_SECONDS = 7 * 86400.0
"""What was given up is a few kilobytes that count it; they wait so long for a collector that wants to know."""


def launches(base: Path) -> set[Path]:
    """Folders of this user's launches below a folder of rings."""
    found = {path.parent for pattern in ("*.ring", LOCK_NAME) for path in paths_below(base, f"*/*/{pattern}")}
    return {folder for folder in found if _is_ours(folder)}


def orphans(folders: set[Path]) -> list[Contents]:
    """Those none of whose ranks lives, oldest first. A recorder may still be there: whoever has the lock knows."""
    found = (contents(folder) for folder in folders)
    return sorted((each for each in found if each is not None and not each.alive), key=lambda each: each.newest)


def give_up(base: Path, *, now: float) -> Iterator[str]:
    """Keep orphans within the limits; what was done, in words. now: Unix seconds.

    Rings that are given up, the oldest first, are cut down to their headers and count what is lost, until a collector
    has been told.
    """
    folders = launches(base)
    left = orphans(folders)
    size, most = sum(each.full_bytes for each in left), most_bytes(base)
    for each in left:
        if each.full_bytes and (size > most or now - each.newest > KEPT_SECONDS):
            size -= each.full_bytes
            lost = _locked(each.folder, _cut)
            if lost:
                yield f"given up: {lost} records of run {each.run} in {each.folder}"
        elif not each.full_bytes and now - each.newest > COUNTED_SECONDS and _locked(each.folder, _removed):
            yield f"removed what was left of run {each.run} in {each.folder}"
    for folder in folders:
        # Without a ring that this version can read.
        with suppress(FileNotFoundError):
            if contents(folder) is None and _untouched_since(folder) < now - KEPT_SECONDS and _locked(folder, _removed):
                yield f"removed {folder}"


def most_bytes(base: Path) -> float:
    """Bytes of rings that may wait below `base`."""
    with suppress(OSError):
        system = os.statvfs(base)
        return min(KEPT_BYTES, KEPT_SHARE * system.f_blocks * system.f_frsize)
    return KEPT_BYTES


def _locked(folder: Path, what: Callable[[Path], int]) -> int:
    """Do it with the folder's lock; nothing where a recorder has it."""
    held = lock(folder, patience=0.0)
    if held is None:
        return 0
    try:
        return what(folder)
    finally:
        release(folder, held)


def _cut(folder: Path) -> int:
    lost = 0
    for path in folder.glob("*.ring"):
        with suppress(OSError, ValueError):
            reader = RingReader(path)
            # A rank may have come since they were counted.
            if not reader.given_up and not reader.alive:
                lost += reader.give_up()
    return lost


def _is_ours(folder: Path) -> bool:
    # A launch that ends may take its folder along at any moment.
    with suppress(FileNotFoundError):
        return folder.lstat().st_uid == os.getuid()
    return False


def _removed(folder: Path) -> int:
    remove(folder)
    return 1


def _untouched_since(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
