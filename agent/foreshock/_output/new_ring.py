"""Where a rank's ring is made: in shared memory or, where that is full, in the temporary folder."""

from __future__ import annotations

import errno
from typing import Any

from foreshock._log import warn_once
from foreshock_recorder.paths import SHARED_MEMORY, ring_folder, ring_name, temporary_base
from foreshock_recorder.ring import Ring

_FULL = (errno.ENOSPC, errno.EDQUOT)


def new_ring(run: str, launch: str, rank: int, identity: dict[str, Any], *, layers: int) -> Ring:
    """Make the ring of this rank. Raises `OSError` where there is no room either, or in a folder that was chosen."""
    name, folder = ring_name(launch, rank), ring_folder(run, launch)
    try:
        return Ring.create(folder / name, identity, layers=layers)
    except OSError as error:
        if error.errno not in _FULL or SHARED_MEMORY not in folder.parents:
            raise
    ring = Ring.create(ring_folder(run, launch, str(temporary_base())) / name, identity, layers=layers)
    warn_once("shared memory", f"shared memory is full, so the flight recorder is in {ring.path.parent}")
    return ring
