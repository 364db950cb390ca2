"""Rings of any bytes, and what a recorder does with one."""

from __future__ import annotations

import struct
from pathlib import Path

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.folder import contents
from foreshock_recorder.ranks import Rank
from tests.support.rings import make_ring, step

_SLOTS = 64


def whole_ring(folder: Path) -> bytes:
    """A ring with some records, made in a folder."""
    ring = make_ring(folder, slots=_SLOTS)
    for sequence in range(1, 10):
        step(ring, sequence)
    return ring.path.read_bytes()


def serve(path: Path) -> None:
    """Do with a ring what a recorder does. Raises what it does not expect."""
    contents(path.parent)
    try:
        rank = Rank(path)
    except (OSError, ValueError):
        return
    try:
        for now in (0.0, 1.0, 100.0):
            rank.fill_seconds()
            rank.poll(now)
            for message in rank.next_messages(now, interval=1.0, limit=512):
                assert message.ByteSize() < 2**22
            rank.acknowledge(pb.Ack.Position(instance=rank.instance, sequence=0))
    except (ValueError, OverflowError, struct.error):
        pass  # the delivery ignores such a ring, and says so
    finally:
        rank.close()
