"""Rings whose ranks have exited before a collector took all they hold: kept for a later recorder, within limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from foreshock_recorder.folder import Contents, contents, has_rings, lock, paths_below, release, remove
from foreshock_recorder.paths import LOCK_NAME
from foreshock_recorder.reader import RingReader

KEPT_SECONDS = 86400.0
"""Age of its newest record at which a launch's records are given up."""
KEPT_BYTES = 512 * 2**20
"""Size of all rings that are kept for a later recorder."""
KEPT_SHARE = 1 / 4
"""The same as a part of their file system; the smaller limit holds."""
COUNTED_SECONDS = 7 * 86400.0
"""How long the headers of rings that were given up are kept: a few kilobytes that count what is lost, for a collector
that comes back."""


def launches(base: Path) -> set[Path]:
    """Return the folders of this user's launches below a folder of rings."""
    found = {path.parent for pattern in ("*.ring", LOCK_NAME) for path in paths_below(base, f"*/*/{pattern}")}
    return {folder for folder in found if _is_ours(folder)}


def orphans(folders: set[Path]) -> list[Contents]:
    """Return the folders in which no rank lives, oldest first.

    A recorder may still serve them: only the lock shows that.
    """
    found = (contents(folder) for folder in folders)
    return sorted((each for each in found if each is not None and not each.alive), key=lambda each: each.newest)


def give_up(base: Path, *, now: float) -> Iterator[str]:
    """Keep orphans within the limits; yield a line for each thing done. now: Unix seconds.

    Rings that are given up, the oldest first, are cut down to their headers and count what is lost, until a collector
    has stored that count.
    """
    folders = launches(base)
    left = orphans(folders)
    size, limit = sum(each.full_bytes for each in left), max_bytes(base)
    for each in left:
        if each.full_bytes and (size > limit or now - each.newest > KEPT_SECONDS):
            size -= each.full_bytes
            lost = _locked(each.folder, _cut)
            if lost:
                yield f"given up: {lost} records of run {each.run} in {each.folder}"
        elif not each.full_bytes and now - each.newest > COUNTED_SECONDS and _locked(each.folder, _removed):
            yield f"removed what was left of run {each.run} in {each.folder}"
    for folder in folders:
        with suppress(FileNotFoundError):
            if not has_rings(folder):
                # Its recorder was killed behind its last ring. To lock a folder that is gone would make it again.
                if (folder / LOCK_NAME).exists() and _locked(folder, _released):
                    yield f"removed {folder}"
            # Without a ring that this version can read.
            elif (
                contents(folder) is None and _untouched_since(folder) < now - KEPT_SECONDS and _locked(folder, _removed)
            ):
                yield f"removed {folder}"


def max_bytes(base: Path) -> float:
    """Return how many bytes of rings may wait below `base`."""
    with suppress(OSError):
        system = os.statvfs(base)
        return min(KEPT_BYTES, KEPT_SHARE * system.f_blocks * system.f_frsize)
    return KEPT_BYTES


def _locked(folder: Path, action: Callable[[Path], int]) -> int:
    """Run an action with the folder's lock held; do nothing where a recorder has it."""
    held = lock(folder, patience=0.0)
    if held is None:
        return 0
    try:
        return action(folder)
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
    # A launch that ends may remove its folder at any moment.
    with suppress(FileNotFoundError):
        return folder.lstat().st_uid == os.getuid()
    return False


def _removed(folder: Path) -> int:
    remove(folder)
    return 1


def _released(folder: Path) -> int:
    # The release of the lock removes a folder without rings.
    return not has_rings(folder)


def _untouched_since(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
