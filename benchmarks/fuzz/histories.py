"""Random histories of a run: through a live collector, and as a log through `foreshock diagnose`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz.live import Live
from benchmarks.load.block_messages import block_of
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import _as_json, _as_text, replay
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import WEIGHT_BLOCKS, WIRE_NAMES
from foreshock_protos.v1 import telemetry_pb2 as pb

NUMBERS = (
    *(1.0, 0.0, 2.0, 0.1, 1e-4, 30.0, 1e4, -1.0, 1e-8, 1e10, -0.0, 1e-40, 1e38, 1e-300, 1e300, 5e-324, 2.2e-308),
    *(1e150, 1e-150, 1e308, -1e308, 1.7976931348623157e308, math.nan, math.inf, -math.inf),
)
FACTORS = (1.0, 0.99, 1.05, 1.6, 0.5, 4.0, 1e-3, 1e7, -1.0, 0.0, 1e40)
QUICK = DEFAULT.with_overrides(
    {
        "recovered_after": 10,
        "gradient": {"ready_after": 10},
        "loss": {"ready_after": 10},
        "faults": {"begins_after": 5, "ends_after": 5, "vanishing_steps": 15, "divergence_steps": 30},
    }
)
"""Verdicts come sooner, so that short histories reach them."""


@dataclass(frozen=True, kw_only=True)
class LossTrend:
    """Values that go on from one number, each by the same factor, with now and then another in between."""

    start: float
    factor: float = 1.0
    odd: float = 1.0
    every: int = 0

    def values(self, count: int) -> list[float]:
        found, value = [], self.start
        for number in range(count):
            found.append(self.odd if self.every and number % self.every == self.every - 1 else value)
            value *= self.factor
        return found


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Some steps of all ranks, or of some. Numbers are of rank 0; others' local norms are `unlike` times as large."""

    count: int
    norm: LossTrend
    loss: LossTrend | None
    rate: LossTrend
    layers: LossTrend
    unlike: float
    bad: float
    scale: float
    flags: int
    told_by: str
    clock: float
    late: int


@dataclass(frozen=True, kw_only=True)
class History:
    """ranks, layers: how many. rules: those that come sooner, or the defaults."""

    ranks: int
    layers: int
    quick: bool
    blocks: bool
    """Whether its ranks send blocks, or batches."""
    pieces: Sequence[Steps | str]


_number = st.sampled_from(NUMBERS)
_loss_trend = st.builds(
    LossTrend,
    start=_number,
    factor=st.sampled_from(FACTORS),
    odd=_number,
    every=st.sampled_from((0, 0, 1, 2, 7, 30)),
)
_steps = st.builds(
    Steps,
    count=st.integers(1, 60),
    norm=_loss_trend,
    loss=st.none() | _loss_trend,
    rate=_loss_trend,
    layers=_loss_trend,
    unlike=_number,
    bad=st.sampled_from((0.0, 0.0, 0.0, 1.0, -1.0, math.nan, math.inf)),
    scale=st.sampled_from((1.0, 1.0, 65536.0, 0.5, 0.0, math.nan, math.inf)),
    flags=st.sampled_from((0, 0, *pb.RecordFlag.values(), 2**32 - 1)),
    told_by=st.sampled_from(("all", "all", "all", "first", "last", "none")),
    clock=st.sampled_from((0.1, 0.1, 1e-9, 1e9, 0.0, -1.0, 1e308, math.nan, math.inf)),
    late=st.sampled_from((0,) * 12 + (1, 30, 3000, 2**40)),
)
_happening = st.sampled_from(("restart", "again", "exit", "exception", "lost", "launch", "silence", "error", "look"))
histories = st.builds(
    History,
    ranks=st.sampled_from((1, 2, 3)),
    layers=st.sampled_from((0, 1, 3)),
    quick=st.booleans(),
    blocks=st.booleans(),
    pieces=st.lists(st.one_of(_steps, _steps, _steps, _happening), min_size=1, max_size=8),
)


def live(history: History) -> None:
    """Through intake, store, exposition and API, with the collector's restarts. Raises what goes wrong."""
    collector = Live(QUICK if history.quick else DEFAULT)
    try:
        _Recorder(history, collector).play()
    finally:
        collector.close()


class _Recorder:
    """What recorders would send."""

    def __init__(self, history: History, collector: Live) -> None:
        self._history = history
        self._collector = collector
        self._launch = 0
        self._sent = 0
        self._newest: dict[int, pb.StepBatch] = {}

    def play(self) -> None:
        self._hello()
        for piece in self._history.pieces:
            if isinstance(piece, Steps):
                self._steps(piece)
            else:
                self._happens(piece)
            self._collector.commit()
        self._collector.restart()
        self._hello()
        self._collector.commit()
        self._collector.check()

    def _name(self, rank: int) -> str:
        return f"{self._launch}-{rank}"

    def _hello(self) -> None:
        names = [f"layer{i}" for i in range(self._history.layers)]
        model = pb.ModelSummary(type="M", parameters=names, parameter_sizes=[1] * len(names), layers=names)
        model.parameter_layers.extend(range(len(names)))
        for rank in range(self._history.ranks):
            hello = pb.Hello(
                schema_version=SCHEMA_VERSION,
                instance=self._name(rank),
                experiment="e",
                run="r",
                launch_id=f"l{self._launch}",
                started_seconds=self._collector.now,
                topology=pb.Topology(rank=rank, world_size=self._history.ranks),
                model=model,
            )
            assert self._collector.take(pb.FromRecorder(hello=hello))
            assert self._name(rank) not in self._collector.session.refused

    def _steps(self, piece: Steps) -> None:
        first = self._sent + 1 + piece.late
        ranks = range(self._history.ranks)
        told = {"all": ranks, "first": ranks[:1], "last": ranks[-1:], "none": ranks[:0]}[piece.told_by]
        batches = {rank: self._batch(piece, rank, first) for rank in told}
        self._newest |= batches
        for message in self._messages(list(batches.values())):
            assert self._collector.take(message)
        if first + piece.count < 2**50:
            self._sent = first + piece.count - 1

    def _messages(self, batches: list[pb.StepBatch]) -> list[pb.FromRecorder]:
        if self._history.blocks and batches:
            return [pb.FromRecorder(block=block_of(batches))]
        return [pb.FromRecorder(steps=batch) for batch in batches]

    def _batch(self, piece: Steps, rank: int, first: int) -> pb.StepBatch:
        count = piece.count
        norms = piece.norm.values(count)
        batch = pb.StepBatch(instance=self._name(rank), first_sequence=first, step=range(count))
        columns: dict[str, list[Any]] = {name: [0] * count for name in WIRE_NAMES if name != "step"}
        columns |= {
            "flags": [piece.flags ^ (pb.LOCAL_NORMS | (pb.LOSS_OBSERVED if piece.loss else 0))] * count,
            "loss": piece.loss.values(count) if piece.loss else [0.0] * count,
            "learning_rate": piece.rate.values(count),
            "loss_scale": [piece.scale] * count,
            "global_norm": norms,
            "local_norm": [norm * piece.unlike if rank else norm for norm in norms],
            "clip_coefficient": [1.0] * count,
            "monotonic_seconds": [piece.clock * (first + i) for i in range(count)],
            "wall_seconds": [piece.clock] * count,
            "reduced_sequence": [float(first + i) for i in range(count)],
            "reduced_loss_sum": piece.rate.values(count),
            "reduced_loss_count": [piece.unlike] * count,
            "reduced_nan_losses": [piece.bad] * count,
            "local_nan_parameters": [piece.bad if rank else 0.0] * count,
            "global_inf_parameters": [piece.bad] * count,
            "first_nonfinite_local": [piece.unlike] * count,
            "parameter_fingerprint": [piece.unlike if rank else 0.0] * count,
            "parameter_norm": piece.layers.values(count),
            "update_ratio": norms,
            "first_moment_norm": piece.layers.values(count),
            "second_moment_norm": norms,
        }
        for name, values in columns.items():
            getattr(batch, name)[:] = values
        if rank == 0:
            norms_of_layers = [_single(value) for value in piece.layers.values(count * self._history.layers)]
            batch.global_layer_norms.extend(norms_of_layers)
            batch.weight_rows.extend(range(count))
            for name in WEIGHT_BLOCKS:
                getattr(batch, name).extend(norms_of_layers)
        return batch

    def _happens(self, what: str) -> None:
        last = self._name(self._history.ranks - 1)
        if what == "restart":
            self._collector.restart()
            self._hello()
        elif what == "launch":
            self._launch, self._sent, self._newest = self._launch + 1, 0, {}
            # The one before is over: else its name is taken.
            self._collector.now += 100
            self._hello()
        elif what == "again":
            for batch in self._newest.values():
                self._collector.take(pb.FromRecorder(steps=batch))
        elif what == "look":
            self._collector.check()
        elif what == "silence":
            self._collector.now += 1000
        elif what in ("lost", "error"):
            kind = pb.Event.RANK_LOST if what == "lost" else pb.Event.PROBE_ERROR
            self._collector.take(pb.FromRecorder(event=pb.Event(instance=last, kind=kind, wall_seconds=math.nan)))
        else:
            reason = pb.ExitReason.EXCEPTION if what == "exception" else pb.ExitReason.FINISHED
            for rank in range(self._history.ranks):
                exit_message = pb.Exit(
                    instance=self._name(rank), reason=reason, detail="E: x", last_sequence=self._sent
                )
                self._collector.take(pb.FromRecorder(exit=exit_message))


def _single(value: float) -> float:
    """What a float32 can hold."""
    return math.copysign(math.inf, value) if abs(value) > 3.4e38 else value


def diagnosed(history: History) -> None:
    """As a log through `foreshock diagnose`, of rank 0. Raises what goes wrong."""
    rows: list[Row] = []
    step = 0.0
    for piece in history.pieces:
        if isinstance(piece, str):
            step = 0.0 if piece == "launch" else step + 100
            continue
        norms, rates = piece.norm.values(piece.count), piece.rate.values(piece.count)
        losses = piece.loss.values(piece.count) if piece.loss else [None] * piece.count
        step += piece.late
        for norm, loss, rate in zip(norms, losses, rates, strict=True):
            told = piece.told_by != "last"
            rows.append(Row(step=step, norm=norm if told else None, loss=loss, rate=rate))
            step += abs(piece.clock) if math.isfinite(piece.clock) else 1
    if not rows:
        return
    found = replay(rows, QUICK if history.quick else DEFAULT)
    json.dumps(_as_json("log", found), allow_nan=False)  # type: ignore[arg-type]
    assert _as_text("log", found)  # type: ignore[arg-type]
