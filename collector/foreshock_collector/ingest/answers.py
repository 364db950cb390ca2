"""What an acknowledgement says about the instances of a stream."""

from __future__ import annotations

import math

from foreshock_collector.ingest.session import Session
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.notice import notice
from foreshock_protos.v1 import telemetry_pb2 as pb


def positions(runs: Runs, session: Session) -> list[pb.Ack.Position]:
    """Return how far each instance of a stream is stored, or why it is refused.

    Without those whose run has left memory: that ended long ago, and the stream has had their last position.
    """
    found = []
    for name in sorted(session.registered):
        known = runs.find_in_memory(name)
        if known is None:
            continue
        run, instance = known
        position = pb.Ack.Position(instance=name, sequence=instance.stored, closed=instance.closed_stored, run=run.name)
        if name in session.resuming and not instance.stored:
            position.history.CopyFrom(run.norms_before(instance))
        if name in session.mirroring:
            position.notice = notice(run)
        found.append(position)
    return found + [pb.Ack.Position(instance=name, refused=why) for name, why in sorted(session.refused.items())]


def held_seconds(runs: Runs, session: Session) -> float:
    """Return for how long the steps of a stream's jobs stay in memory, at their present pace; Inf if unknown."""
    known = filter(None, (runs.find_in_memory(name) for name in session.registered))
    attempts = {id(attempt): attempt for attempt in (run.attempts[instance.attempt] for run, instance in known)}
    return min((attempt.held_seconds() for attempt in attempts.values()), default=math.inf)
