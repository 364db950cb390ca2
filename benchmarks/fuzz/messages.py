"""Random messages on one stream, each field at its extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from benchmarks.fuzz.live import Live
from benchmarks.load.block_messages import block_of
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import WIRE_NAMES
from foreshock_protos.v1 import telemetry_pb2 as pb

_DOUBLES = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-300, 1e150, 1e308, -1e308, 2.0**53, 0.5, math.nan, math.inf, -math.inf)
_FLOATS = (0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf)
_TEXTS = (
    "",
    "a",
    "r",
    "0",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "{}",
    '"\\',
    "é" * 200,
    "x" * 201,
    "x" * 5000,
    "\U0010ffff",
)
_F = FieldDescriptor
_EXTREMES: dict[int, Sequence[Any]] = {
    _F.TYPE_DOUBLE: _DOUBLES,
    _F.TYPE_FLOAT: _FLOATS,
    _F.TYPE_UINT32: (0, 1, 2, 3, 255, 2**31, 2**32 - 1),
    _F.TYPE_UINT64: (0, 1, 2, 100, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    _F.TYPE_SINT64: (0, 1, -1, 2**53, 2**63 - 1, -(2**63)),
    _F.TYPE_BOOL: (False, True),
    _F.TYPE_STRING: _TEXTS,
    _F.TYPE_BYTES: (b"", b"\0", bytes(8), b"\xff" * 8, b"\xff" * 4, *(b"\xff" * 8 * n for n in (17, 23, 69, 138, 160))),
}
_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Change:
    """One field of a message, by the place of its name among all, set to one of its extremes."""

    field: int
    extreme: int
    length: int
    """Of a repeated one: so many of it, or as many as there were."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A message that is right, but for some changes."""

    kind: str
    rank: int
    changes: Sequence[Change]


_change = st.builds(
    Change,
    field=st.integers(0, 99),
    extreme=st.integers(0, 13),
    length=st.sampled_from((-1, -1, -1, 0, 1, 2, 3, 4, 40)),
)
_said = st.builds(
    Said,
    kind=st.sampled_from(("hello", "steps", "steps", "block", "block", "event", "exit")),
    rank=st.integers(0, 1),
    changes=st.lists(_change, max_size=4),
)
conversations = st.lists(_said, min_size=1, max_size=8)


def conversation(told: Sequence[Said]) -> None:
    """On one stream, which is opened anew after a refusal; then the collector is restarted. Raises what goes wrong."""
    collector = Live(DEFAULT)
    try:
        _greet(collector)
        for number, said in enumerate(told):
            if not collector.take(_message(said, number)):
                _greet(collector)
            if number % 2:
                collector.commit()
        collector.commit()
        if len(told) % 2:
            collector.check()
        collector.restart()
        _greet(collector)
        collector.commit()
        collector.check()
    finally:
        collector.close()


def _greet(collector: Live) -> None:
    for rank in range(2):
        # It may be refused: another may have taken its place by now.
        collector.take(pb.FromRecorder(hello=_hello(rank)))


def _message(said: Said, number: int) -> pb.FromRecorder:
    message = pb.FromRecorder()
    name = str(said.rank)
    if said.kind == "hello":
        message.hello.CopyFrom(_hello(said.rank))
    elif said.kind == "steps":
        message.steps.CopyFrom(_batch(name, 1 + _ROWS * number))
    elif said.kind == "block":
        first = 1 + _ROWS * number
        message.block.CopyFrom(block_of([_batch(str(rank), first) for rank in range(1 + said.rank)]))
    elif said.kind == "event":
        message.event.CopyFrom(pb.Event(instance=name, kind=pb.Event.RANK_LOST, step=1, wall_seconds=1.0))
    else:
        message.exit.CopyFrom(pb.Exit(instance=name, reason=pb.ExitReason.FINISHED, last_sequence=_ROWS))
    for change in said.changes:
        _apply(getattr(message, said.kind), change)
    return message


def _hello(rank: int) -> pb.Hello:
    return pb.Hello(
        schema_version=SCHEMA_VERSION,
        instance=str(rank),
        experiment="e",
        run="r",
        launch_id="l",
        started_seconds=1.0,
        topology=pb.Topology(rank=rank, world_size=2, node="n"),
        model=pb.ModelSummary(
            type="M", module_types={"M": 1}, parameters=["w"], parameter_sizes=[1], layers=["l"], parameter_layers=[0]
        ),
        optimizer=pb.OptimizerSummary(type="SGD"),
        clip="none",
    )


def _batch(instance: str, first: int) -> pb.StepBatch:
    batch = pb.StepBatch(instance=instance, first_sequence=first, step=range(first, first + _ROWS))
    for name in WIRE_NAMES:
        if name != "step":
            getattr(batch, name)[:] = [pb.LOCAL_NORMS | pb.LOSS_OBSERVED if name == "flags" else 1] * _ROWS
    return batch


def _apply(message: Any, change: Change) -> None:
    """Where a field is a message itself, one of that one's."""
    fields = message.DESCRIPTOR.fields
    field = fields[change.field % len(fields)]
    if field.message_type is not None and not field.message_type.GetOptions().map_entry:
        inner = getattr(message, field.name)
        if hasattr(inner, "add"):
            inner = inner[-1] if inner and change.length else inner.add()
        _apply(inner, Change(field=change.field // 7, extreme=change.extreme, length=change.length))
        return
    if field.message_type is not None:
        key, value = (_extreme(part, change.extreme) for part in field.message_type.fields)
        getattr(message, field.name)[key] = value
        return
    extreme = _extreme(field, change.extreme)
    if hasattr(getattr(message, field.name), "extend"):
        values = getattr(message, field.name)
        length = len(values) if change.length < 0 else change.length
        values[:] = [extreme] * length
    else:
        setattr(message, field.name, extreme)


def _extreme(field: FieldDescriptor, number: int) -> Any:
    choices = _EXTREMES.get(field.type) or (*field.enum_type.values_by_number, 2**31 - 1)  # type: ignore[union-attr]
    return choices[number % len(choices)]
