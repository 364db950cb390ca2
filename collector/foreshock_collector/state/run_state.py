"""What is stored of a run, and what of it the next commit has to store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foreshock_collector.records.steps import Step
from foreshock_collector.state.attempts import Attempt, AttemptState
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.totals import Totals
from foreshock_protos.v1 import telemetry_pb2 as pb

Members = Sequence[tuple[int, Instance]]
"""Instances of a block, each with its place among the block's ranks."""


@dataclass(kw_only=True)
class RunState:
    """Stored state of a run, in addition to its steps, instances, events and incidents."""

    experiment: str
    attempts: list[AttemptState]
    totals: Totals
    errors: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Received:
    """A message with records: the store keeps it until their steps are finalized."""

    message: pb.StepBatch | pb.StepBlock
    attempt: int
    last_sequence: int
    instance: str
    """Of a batch; empty for a block, which names its own."""


def received(instance: Instance, message: pb.StepBatch | pb.StepBlock) -> Received:
    """Return a message of an instance, or of several with this one among them."""
    if isinstance(message, pb.StepBatch):
        last = message.first_sequence + len(message.step) - 1
        return Received(message=message, attempt=instance.attempt, last_sequence=last, instance=instance.name)
    last = message.first_sequence + message.steps - 1
    return Received(message=message, attempt=instance.attempt, last_sequence=last, instance="")


@dataclass(kw_only=True)
class Unsaved:
    """Changes to a run since the last commit, in addition to its events and incidents."""

    attempts: list[Attempt] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    """By name."""
    received: list[Received] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.attempts or self.instances or self.received or self.steps)
