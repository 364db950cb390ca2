"""One attach of one rank: where it runs, how far its records have come, and how it left."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.catalogue import DROP_REASONS
from foreshock_collector.records.batch import complete, locally_measured, observed
from foreshock_collector.records.block import Block
from foreshock_collector.records.gaps import Gap, count_up_to, gaps_after
from foreshock_collector.state.events import RankEvent
from foreshock_protos.v1 import telemetry_pb2 as pb

CLEAN_EXITS = ("FINISHED", "DETACHED")
"""Exit reasons that need no attention."""
_CLOCK_SECONDS = 5.0
"""Clocks that differ by more do not show which of two ranks left first."""


@dataclass(kw_only=True, eq=False)
class InstanceState:
    """Stored state of an instance."""

    name: str
    attempt: int
    """Number of the attempt that it belongs to."""
    rank: int
    local_rank: int
    node: str
    pid: int
    layers: int
    position: int = 0
    """Sequence number of the newest record that was ingested."""
    gaps: list[Gap] = field(default_factory=list)
    """Records below `position` that have not come: they still may, until their steps are finalized."""
    closed: str = ""
    """The reason of its exit; empty while it runs."""
    detail: str = ""
    """The text of its exit, or of its loss."""
    last_report: float = 0.0
    """Unix time at which it last reported."""
    last_step: int | None = None
    last_finished: bool = True
    """Whether the last step finished, and was not only launched."""
    loss: float | None = None
    local_norm: float | None = None
    """Newest finite local norm."""
    local_nonfinite: str = ""
    """"nan" or "inf" where a local norm newer than `local_norm` is not finite."""
    left_seconds: float = 0.0
    """Unix time at which it left abnormally, as near as it is known; 0: it has not."""
    backward_passes: int = 0
    """Backward passes begun, counted before the rank waits for the others; 0: it does not count them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records that the rank dropped since its attach, by reason: kept, so that nothing counts twice."""
    reported_events: list[str] = field(default_factory=list)
    """Kinds of events that were reported of it: a recorder repeats them after each reconnect."""
    token_digest: str = ""
    """SHA-256 of the secret that its first hello gave; empty if it gave none."""

    @classmethod
    def from_hello(cls, hello: pb.Hello, attempt: int, now: float) -> InstanceState:
        """A new instance, as its hello describes it."""
        place = hello.topology
        return cls(
            name=hello.instance,
            attempt=attempt,
            rank=place.rank,
            local_rank=place.local_rank,
            node=place.node,
            pid=hello.pid,
            layers=len(hello.model.layers),
            last_report=now,
            token_digest=token_digest(hello),
        )


def token_digest(hello: pb.Hello) -> str:
    """Return the SHA-256 of a hello's secret; empty without one."""
    return hashlib.sha256(hello.token.encode()).hexdigest() if hello.token else ""


class Instance(InstanceState):
    """Follows one attach of one rank. What it adds to its state lives in memory only."""

    def __init__(self, state: InstanceState, *, gone: bool = False) -> None:
        """gone: it had left before its hello came, and its records are handed in afterwards."""
        super().__init__(**vars(state))
        self.gone = gone
        self.stored = 0
        """Sequence number of the newest record that is committed, and may be acknowledged."""
        self.closed_stored = False
        """Whether its exit is committed."""
        self.leaving = ""
        """The reason of an exit whose last steps are not all finalized yet."""
        self.nonfinite = False
        """Whether something that is not finite has come since this was last reset."""

    def is_sent_by(self, hello: pb.Hello) -> bool:
        """Return whether a hello has the secret of this instance."""
        return hmac.compare_digest(self.token_digest, token_digest(hello))

    @property
    def status(self) -> str:
        """Its state, for people: "running", or its exit: "finished", "detached", "exception", "lost"."""
        return self.closed.lower() or "running"

    @property
    def ended(self) -> str:
        """The reason of its exit, also before its last steps are finalized."""
        return self.closed or self.leaving

    @property
    def reporting(self) -> bool:
        """Whether it runs, or left cleanly."""
        return self.closed in ("", *CLEAN_EXITS)

    def mark_stored(self) -> None:
        """Note that its newest record and its exit are committed."""
        self.stored, self.closed_stored = self.position, bool(self.closed)

    def lost_up_to(self, sequence: int) -> int:
        """Return how many records up to this sequence number have not come; they will not be waited for any longer."""
        if not self.gaps:
            return 0
        lost, self.gaps = count_up_to(self.gaps, sequence)
        return lost

    def newly_dropped(self, dropped: Mapping[str, int]) -> Counter[str]:
        """Count records that the rank reports as dropped and did not report before, by reason."""
        new: Counter[str] = Counter()
        for reason, count in dropped.items():
            # Cumulative since the attach: only what is new counts, however often it is reported.
            if reason in DROP_REASONS:
                before = self.dropped.get(reason, 0)
                new[reason] = max(0, count - before)
                self.dropped[reason] = max(count, before)
        return new

    def record_event(self, event: pb.Event, now: float) -> RankEvent | None:
        """Note an event that a recorder reports; None where one of its kind was reported before."""
        kind = pb.Event.Kind.Name(event.kind).lower()
        if kind in self.reported_events:
            return None
        self.reported_events.append(kind)
        if event.kind == pb.Event.RANK_LOST:
            # Its exit repeats this, but only behind its last records.
            self.detail = self.detail or event.detail
            # The recorder's clock shows which rank was first, unless it is wrong.
            self.left_seconds = event.wall_seconds if abs(event.wall_seconds - now) < _CLOCK_SECONDS else now
        return RankEvent(
            kind=kind,
            attempt=self.attempt,
            step=event.step,
            rank=self.rank,
            instance=self.name,
            detail=event.detail,
            seen_seconds=now,
        )

    def reopen(self) -> None:
        """Forget that it had finished: its training had waited for another one of its process."""
        self.closed = self.leaving = ""
        self.gone = self.closed_stored = False

    def close(self, exit_message: pb.Exit, now: float) -> int:
        """Note that the rank has left; how many records are missing up to its last one, and will not come."""
        if self.closed:
            return 0
        missing = max(0, exit_message.last_sequence - self.position)
        self.position += missing
        self.leaving = pb.ExitReason.Name(exit_message.reason)
        self.detail = exit_message.detail
        if self.leaving not in CLEAN_EXITS:
            self.left_seconds = self.left_seconds or now
        return missing


def note_records(instances: Sequence[Instance], block: Block) -> None:
    """Note for each rank of a block that these records have come, and remember the newest values."""
    rows, sequences = block.rows, block.sequences
    first, last = int(sequences[0]), int(sequences[-1])
    newest = rows[-1]
    measured = locally_measured(rows)
    at = _last_of(measured)
    norms = _chosen(rows["local_norm"], at)
    nan = (_chosen(rows["local_nan_parameters"], at) > 0) | np.isnan(norms)
    inf = (_chosen(rows["local_inf_parameters"], at) > 0) | np.isinf(norms)
    finite = measured & np.isfinite(rows["local_norm"])
    facts: list[NDArray[Any]] = [
        np.logical_or.reduce(block.nonfinite),
        newest["step"],
        complete(newest),
        observed(newest),
        newest["loss"],
        np.logical_or.reduce(measured),
        np.where(nan, "nan", np.where(inf, "inf", "")),
        np.logical_or.reduce(finite),
        _chosen(rows["local_norm"], _last_of(finite)),
    ]
    by_instance = zip(instances, *(fact.tolist() for fact in facts), strict=True)
    for instance, bad, step, finished, has_loss, loss, is_measured, local_kind, has_norm, norm in by_instance:
        instance.nonfinite |= bad
        position = instance.position
        if instance.gaps or first > position + 1:
            instance.gaps = gaps_after(instance.gaps, position, sequences)
        if last < position:
            continue
        instance.position = last
        instance.last_step, instance.last_finished = step, finished
        instance.loss = loss if has_loss else None
        if is_measured:
            instance.local_nonfinite = local_kind
        if has_norm:
            instance.local_norm = norm


def _last_of(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the last chosen step of each rank; the last of all where none is. chosen: [steps, ranks]."""
    found: NDArray[np.int64] = len(chosen) - 1 - chosen[::-1].argmax(axis=0)
    return found


def _chosen(values: NDArray[np.float64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values[steps, np.arange(values.shape[1])]
    return found
