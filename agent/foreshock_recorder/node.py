"""What the ranks of one folder send next, together: with a collector that takes blocks, one message for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.blocks import Piece, blocks
from foreshock_recorder.ranks import Rank

OnError = Callable[[Path, Exception], None]
"""Told of a ring that cannot be read; the other ranks are served."""


class Node:
    """Composes the messages of one stream. Times are monotonic seconds."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._flushed = -math.inf
        self._sent_up_to: dict[tuple[str, str], int] = {}
        """By launch, the highest sequence number that any rank had when blocks were last sent."""

    def next_messages(
        self, ranks: Mapping[Path, Rank], now: float, *, interval: float, limit: int
    ) -> list[pb.FromRecorder]:
        """Return what to send now, as `Rank.next_messages` does for one rank, in the same order for each of them."""
        due = now - self._flushed >= interval
        messages: list[pb.FromRecorder] = []
        speaking: dict[Path, Rank] = {}
        for path, rank in ranks.items():
            try:
                messages += rank.opening(now, due=due)
                if rank.accepted:
                    rank.read_ahead(now, limit=limit)
                    speaking[path] = rank
            except Exception as error:
                self._on_error(path, error)
        pressing = any(rank.pressing(limit) for rank in speaking.values())
        if speaking and (due or pressing):
            self._flushed = now
            messages += blocks(self._pieces(speaking, now, limit=limit, pressing=pressing))
        for rank in speaking.values():
            messages += rank.closing()
        return messages

    def _pieces(self, speaking: dict[Path, Rank], now: float, *, limit: int, pressing: bool) -> list[Piece]:
        """Take what the ranks have to send. A rank whose ring cannot be read is removed from `speaking`."""
        pieces = []
        for launch in dict.fromkeys(rank.launch for rank in speaking.values()):
            members = {
                path: rank
                for path, rank in speaking.items()
                if rank.launch == launch and (rank.speaks or rank.pressing(limit))
            }
            if not members:
                continue
            # Ranks take steps together, yet one is read a moment before another: what not all of them have waits for
            # the next block, and no longer, so that one block holds all.
            newest = [rank.read_up_to for rank in members.values()]
            before = self._sent_up_to.get(launch, 0)
            up_to = math.inf if pressing else max(min(newest), before)
            self._sent_up_to[launch] = max(newest)
            for path, rank in members.items():
                try:
                    pieces.append(rank.take(now, limit=limit, up_to=up_to))
                except ValueError as error:
                    self._on_error(path, error)
                    del speaking[path]
        return pieces
