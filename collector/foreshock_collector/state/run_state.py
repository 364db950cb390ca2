"""What is stored of a run, and what of it the next commit has to store."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreshock_collector.records.steps import Step
from foreshock_collector.state.attempts import Attempt, AttemptState
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.totals import Totals
from foreshock_protos.v1 import telemetry_pb2 as pb


@dataclass(kw_only=True)
class RunState:
    """Stored state of a run, in addition to its steps, instances, events and incidents."""

    experiment: str
    attempts: list[AttemptState]
    totals: Totals
    errors: dict[str, int]


@dataclass(kw_only=True)
class Unsaved:
    """Changes to a run since the last commit, in addition to its events and incidents."""

    attempts: list[Attempt] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    """By name."""
    batches: list[tuple[Instance, pb.StepBatch]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.attempts or self.instances or self.batches or self.steps)
