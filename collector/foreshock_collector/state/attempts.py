"""One launch of a run: its ranks, their records, and what the detector knows of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from foreshock_collector.analysis.departures import Departure
from foreshock_collector.analysis.detection import Detector
from foreshock_collector.analysis.faults import FaultDetector
from foreshock_collector.analysis.noise import NoiseScale
from foreshock_collector.analysis.rules import Rules
from foreshock_collector.records.buffer import RecordBuffer, Records, complete, locally_measured, nonfinite_mask
from foreshock_collector.records.steps import ModelFacts, Step
from foreshock_protos.v1 import telemetry_pb2 as pb

WINDOW_STEPS = 512
"""Steps that are kept at hand, and those whose rank-level records outlive a restart."""
_MOST_LAYERS, _LAYER_STEPS = 16, 64
"""Layers that become series, and the steps by whose largest norms they are chosen: few, and seldom others."""
PEACEFUL = ("FINISHED", "DETACHED")
"""Goodbyes that nobody needs to worry about."""
Outcome = Literal["", "ended", "interrupted", "failed"]
"""How an attempt came to its end, where that has been judged."""


@dataclass(eq=False)
class Instance:
    """One attach of one rank."""

    name: str
    attempt: Attempt
    rank: int
    local_rank: int
    node: str
    pid: int
    layers: int
    position: int = 0
    """Highest record taken in."""
    stored: int = 0
    """Highest record committed: what may be acknowledged."""
    leaving: str = ""
    """Its goodbye has come, the steps before it are not all settled."""
    closed: str = ""
    """How it left, empty while it is there."""
    closed_stored: bool = False
    detail: str = ""
    """What it said at its end."""
    last_report: float = 0.0
    gone: bool = False
    """It had left when it said hello: its records are handed in afterwards."""
    troubled: bool = False
    """Its newest batch held something that is not finite."""
    last_step: int | None = None
    last_finished: bool = True
    """The last step was not only launched."""
    loss: float | None = None
    local_norm: float | None = None
    """Newest finite one..."""
    local_nonfinite: str = ""
    """... and "nan" or "inf" where a newer one is not finite."""
    dropped: dict[str, int] = field(default_factory=dict)
    """As told by the rank, cumulative since its attach: kept, so that nothing counts twice."""
    left_seconds: float = 0.0
    """When it left as it should not, as near as it is known; 0: it has not."""
    backward_passes: int = 0
    """As told by the rank, counted before it waits for the others; 0: it does not count them."""
    told: list[str] = field(default_factory=list)
    """Kinds of events that it has told: a recorder repeats them after each reconnect."""

    @property
    def state(self) -> str:
        """As people read it: "running", or its goodbye: "finished", "detached", "exception", "lost"."""
        return self.closed.lower() or "running"

    @property
    def ended(self) -> str:
        """Its goodbye, also before its last steps are settled."""
        return self.closed or self.leaving

    @property
    def reporting(self) -> bool:
        """There, or gone as it should."""
        return self.closed in ("", *PEACEFUL)

    def update(self, records: Records) -> None:
        """Remember the newest values of these records."""
        rows = records.rows
        newest = rows[-1]
        self.nonfinite = bool(nonfinite_mask(rows).any())
        self.position = int(newest["sequence"])
        self.last_step, self.last_finished = int(newest["step"]), bool(complete(newest))
        self.loss = float(newest["loss"]) if newest["flags"] & pb.LOSS_OBSERVED else None
        told = rows[locally_measured(rows)]
        if told.size:
            last = told[-1]
            nan = last["local_nan_parameters"] > 0 or math.isnan(last["local_norm"])
            inf = last["local_inf_parameters"] > 0 or math.isinf(last["local_norm"])
            self.local_nonfinite = "nan" if nan else "inf" if inf else ""
        norms = told["local_norm"][np.isfinite(told["local_norm"])]
        if norms.size:
            self.local_norm = float(norms[-1])


class Attempt:
    """One launch of a run. `hello`: the first that came of it. rules: of detection and diagnosis."""

    def __init__(self, number: int, hello: pb.Hello, rules: Rules, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.number = number
        self.launch = hello.launch
        self.started_seconds: float = state.get("started_seconds", hello.started_seconds)
        """Unix time; never before an attempt that it has followed, whatever the clock of its machine says."""
        self.hello = hello
        self.world_size = hello.topology.world_size
        self.model = ModelFacts.from_summary(hello.model)
        self.instances: dict[int, Instance] = {}
        self._rules = rules
        self.detector = Detector(state.get("detector"), rules)
        self.incidents: dict[str, int] = state.get("incidents", {})
        """Numbers of the incidents that are still open, by what each is open under."""
        self.failure: dict[str, Any] = state.get("failure", {})
        """Of the newest step that began a failure: its number, and what was known of the steps before."""
        self.departures_checked: int = state.get("departures_judged", 0)
        """Of so many ranks it has been said why they left as they should not."""
        self.silent: bool = state.get("silent", False)
        """Nobody hears of it, though it has not left."""
        self.ending: str = state.get("ending", "")
        """What ended it while it was failing already."""
        self.outcome: Outcome = state.get("outcome", "")
        self.past = False
        """A later attempt makes steps, or its ranks had left before they were heard of: nobody can do anything now."""
        self.needs_reevaluation = False
        """Records of that step have come since it was judged."""
        self.noise = NoiseScale(**state.get("noise", {}))
        self.faults = FaultDetector(state.get("faults"), rules)
        self.finalized: int = state.get("finalized", 0)
        """Sequence number up to which steps have been through detection."""
        self.steps: deque[Step] = deque(maxlen=WINDOW_STEPS)
        self._buffer: RecordBuffer | None = None

    def state(self) -> dict[str, Any]:
        """What must survive, as JSON."""
        return {
            "started_seconds": self.started_seconds,
            "detector": self.detector.state(),
            "faults": self.faults.state(),
            "noise": self.noise.state(),
            "incidents": self.incidents,
            "failure": self.failure,
            "departures_judged": self.departures_checked,
            "silent": self.silent,
            "ending": self.ending,
            "outcome": self.outcome,
            "finalized": self.finalized,
        }

    @property
    def buffer(self) -> RecordBuffer:
        """The ranks' newest records; made when they are needed, gone after `rest`."""
        if self._buffer is None:
            self._buffer = RecordBuffer(
                world_size=self.world_size, layers=len(self.model.layers), finalized=self.finalized
            )
            for instance in self.instances.values():
                # What lies between comes again from the store, and must then wait as it did before.
                self._buffer.positions[instance.rank] = min(instance.position, self.finalized)
        return self._buffer

    @property
    def idle(self) -> bool:
        """Nothing waits to be put together."""
        return self._buffer is None or self._buffer.finalized == self._buffer.highest

    @property
    def evicted(self) -> bool:
        """Nothing is at hand but what the store has."""
        return self._buffer is None

    @property
    def over(self) -> bool:
        """All ranks that ever said hello have left."""
        return bool(self.instances) and all(i.closed for i in self.instances.values())

    def ended_at(self, sequence: int) -> bool:
        """A rank that made this step has left, and not at its user's word; one that left before tells nothing of it."""
        ranks = self.instances.values()
        return any(i.ended not in ("", "INTERRUPTED") and i.position >= sequence for i in ranks)

    @property
    def handed_in(self) -> bool:
        """All its ranks had left before the collector heard of them, or heard of them again."""
        return all(i.gone for i in self.instances.values())

    def evict(self) -> None:
        """Let go of records and steps: the run has ended."""
        self._buffer = None
        self.steps.clear()

    def departures(self) -> list[Departure]:
        """Ranks that left as they should not."""
        return [
            Departure(i.left_seconds, i.rank, i.last_step, i.ended or "LOST", i.detail)
            for i in self.instances.values()
            if i.left_seconds
        ]

    def last_heard(self) -> float:
        """When any of its ranks last reported."""
        return max((i.last_report for i in self.instances.values()), default=0.0)

    def write(self, instance: Instance, records: Records, now: float) -> None:
        """Keep records of a rank; the caller has made room."""
        if len(records):
            self.buffer.write(instance.rank, records, now)
            first, last = (int(records.rows["sequence"][end]) for end in (0, -1))
            self.needs_reevaluation |= first <= self.failure.get("sequence", 0) <= min(last, self.finalized)

    def largest_layers(self) -> list[tuple[str, float]]:
        """Names and newest finite norms of the layers that had the largest ones lately, in the model's order."""
        if self._buffer is None or not self.model.layers:
            return []
        first = max(1, self.finalized - _LAYER_STEPS + 1)
        norms = self._buffer.layer_norms_of(np.arange(first, self.finalized + 1))
        if not len(norms):
            return []
        finite = np.isfinite(norms)
        known = np.flatnonzero(finite.any(axis=0))
        peaks = np.where(finite, norms, -math.inf).max(axis=0, initial=-math.inf)
        chosen = sorted(known[np.argsort(-peaks[known], kind="stable")[:_MOST_LAYERS]].tolist())
        newest = len(norms) - 1 - finite[::-1].argmax(axis=0)
        return [(self.model.layers[layer], float(norms[newest[layer], layer])) for layer in chosen]

    def due(self, now: float) -> int:
        """Up to where steps may be put together."""
        buffer = self.buffer
        for instance in self.instances.values():
            buffer.awaited[instance.rank] = not (instance.leaving or instance.closed)
        return buffer.due(now)

    def assemble(self, upto: int) -> Iterator[Step]:
        """Steps that are due, in order, and kept. After an error, what follows may still be asked for."""
        buffer = self.buffer
        try:
            for step in buffer.finalize(self.number, upto):
                self.steps.append(step)
                yield step
        finally:
            self.finalized = buffer.finalized

    def forget(self, *, but: Sequence[str]) -> None:
        """What judging has learnt of the steps is not to be trusted: it begins anew. but: incidents that stay open."""
        self.incidents = {key: number for key, number in self.incidents.items() if key in but}
        self.detector, self.faults, self.noise = (
            Detector(rules=self._rules),
            FaultDetector(rules=self._rules),
            NoiseScale(),
        )
        self.failure, self.needs_reevaluation = {}, False
