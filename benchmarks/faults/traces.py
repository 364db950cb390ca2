"""A recorded case: small enough to be committed, and whole enough to be told to a collector again."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.faults.cases import Case, Part
from foreshock_collector.records.batch import RECORD, Rows, decode, locally_nonfinite
from foreshock_collector.records.block import decode_block
from foreshock_protos.v1 import telemetry_pb2 as pb

FOLDER = Path(__file__).parent / "traces"
KEPT_BITS = 12
"""Of a number's mantissa: 1 part in 8,000, far below what any rule judges by."""
_EXACT = ("parameter_fingerprint",)
_CLOCKS = ("wall_seconds", "monotonic_seconds")
_BEFORE, _AFTER, _EVERY = 80, 20, 50
"""Layer norms are kept for so many steps around the first that is not finite, and for one in so many elsewhere."""
_BATCH = 64


class End(NamedTuple):
    """How a rank left. reason: LOST also where only the event came."""

    rank: int
    reason: str
    detail: str
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the ranks of a case told."""

    case: Case
    step_seconds: float
    """Median time of a step: clocks are not kept."""
    hello: pb.Hello
    """Of rank 0, at the first attempt."""
    records: Rows
    """[steps, ranks], as on the collector's buffer, one attempt after another; sequence 0 where that rank has no
    record."""
    layer_norms: NDArray[np.float32]
    """[steps, layers] of the averaged gradient; NaN where they were not kept."""
    ends: tuple[End, ...]
    """In the order in which they came."""
    starts: tuple[int, ...] = (0,)
    """First row of each attempt. Sequence numbers begin with 1 at each."""

    def instance(self, attempt: int, rank: int) -> str:
        """Name of a rank's instance."""
        return f"{self.case.name}-{attempt}-{rank}"

    def hellos(self, attempt: int) -> Iterator[pb.Hello]:
        """One per rank."""
        for rank in range(self.case.ranks):
            hello = pb.Hello()
            hello.CopyFrom(self.hello)
            hello.instance, hello.topology.rank = self.instance(attempt, rank), rank
            hello.launch_id = f"{self.hello.launch_id}-{attempt}"
            hello.started_seconds += self.starts[attempt] * self.step_seconds
            yield hello

    def batches(self, attempt: int) -> Iterator[tuple[int, pb.StepBatch]]:
        """Rank and batch, in the order of steps."""
        last = (*self.starts, len(self.records))[attempt + 1]
        for start in range(self.starts[attempt], last, _BATCH):
            place = slice(start, min(start + _BATCH, last))
            for rank in range(self.case.ranks):
                rows = self.records[place, rank]
                kept = rows["sequence"] > 0
                if kept.any():
                    norms = self.layer_norms[place][kept]
                    yield rank, self._batch(self.instance(attempt, rank), rows[kept], norms if rank == 0 else norms[:0])

    def _batch(self, instance: str, rows: Rows, norms: NDArray[np.float32]) -> pb.StepBatch:
        batch = pb.StepBatch(instance=instance, first_sequence=int(rows["sequence"][0]))
        for field in pb.StepBatch.DESCRIPTOR.fields:
            if field.name in (RECORD.names or ()) and field.name != "sequence":
                values = rows[field.name]
                getattr(batch, field.name).extend(values.tolist())
            elif field.name.startswith("reduced_"):
                getattr(batch, field.name).extend([0] * len(rows))
        if len(norms):
            batch.global_layer_norms.extend(norms.ravel().tolist())
        return batch


def from_messages(case: Case, messages: Sequence[pb.FromRecorder]) -> Trace:
    """What a tape holds of a case."""
    hellos = {m.hello.instance: m.hello for m in messages if m.WhichOneof("message") == "hello"}
    if not hellos:
        raise ValueError("no rank said hello")
    # Names of launches sort by time.
    launches = sorted({hello.launch_id for hello in hellos.values()})
    places = {name: (launches.index(hello.launch_id), hello.topology.rank) for name, hello in hellos.items()}
    hello = next(hellos[name] for name, place in places.items() if place == (0, 0))
    layers = len(hello.model.layers)
    found: list[tuple[tuple[int, int], Rows, Any]] = []
    ends: dict[str, End] = {}
    for message in messages:
        which = message.WhichOneof("message")
        if which == "steps" and len(message.steps.step):
            decoded = decode(message.steps, layers)
            found.append((places[message.steps.instance], decoded.rows, decoded.layer_norms))
        elif which == "block" and message.block.steps:
            block = decode_block(message.block, layers)
            for i, rank_of_block in enumerate(message.block.ranks):
                place = places[rank_of_block.instance]
                found.append((place, block.rows[:, i], block.layer_norms))
        elif which == "exit":
            (attempt, rank), exit_message = places[message.exit.instance], message.exit
            reason = pb.ExitReason.Name(exit_message.reason)
            ends.setdefault(exit_message.instance, End(rank, reason, exit_message.detail, attempt))
        elif which == "event" and message.event.kind == pb.Event.RANK_LOST:
            attempt, rank = places[message.event.instance]
            ends.setdefault(message.event.instance, End(rank, "LOST", "", attempt))
    if not found:
        raise ValueError("no steps were told")
    lengths = [0] * len(launches)
    for (attempt, _), rows, _ in found:
        lengths[attempt] = max(lengths[attempt], int(rows["sequence"][-1]))
    *starts, length = accumulate(lengths, initial=0)
    records = np.zeros((length, case.ranks), RECORD)
    norms = np.full((length, layers), np.nan, np.float32)
    for (attempt, rank), rows, told in found:
        numbers = starts[attempt] + rows["sequence"] - 1
        records[numbers, rank] = rows
        if told is not None:
            norms[numbers] = told
    seconds = np.diff(records["monotonic_seconds"][records["sequence"][:, 0] > 0, 0])
    if case.cause != "vanishing_gradients":
        norms[~_kept(records, len(norms))] = np.nan
    return _reduced(
        Trace(
            case=case,
            step_seconds=float(np.median(seconds)) if len(seconds) else 0.0,
            hello=hello,
            records=records,
            layer_norms=norms,
            ends=tuple(ends.values()),
            starts=tuple(starts),
        )
    )


def _kept(records: Rows, length: int) -> NDArray[np.bool_]:
    places = np.arange(length)
    kept: NDArray[np.bool_] = places % _EVERY == 0
    bad = np.flatnonzero((locally_nonfinite(records) | ~np.isfinite(records["global_norm"])).any(axis=1))
    if len(bad):
        kept |= (places >= bad[0] - _BEFORE) & (places <= bad[0] + _AFTER)
    return kept


def _reduced(trace: Trace) -> Trace:
    records = trace.records.copy()
    for name in records.dtype.names or ():
        if name in _CLOCKS:
            records[name] = 0.0
        elif records.dtype[name] == np.float64 and name not in _EXACT:
            records[name] = _rounded(records[name])
    records["monotonic_seconds"] = np.where(
        records["sequence"] > 0, (np.arange(len(records)) * max(trace.step_seconds, 1e-4))[:, None], 0.0
    )
    norms = _rounded(trace.layer_norms.astype(np.float64)).astype(np.float32)
    values = {field.name: getattr(trace, field.name) for field in fields(trace)}
    return Trace(**(values | {"records": records, "layer_norms": norms}))


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    bits = values.copy().view(np.int64)
    dropped = 52 - KEPT_BITS
    rounded = ((bits + (1 << (dropped - 1))) >> dropped << dropped).view(np.float64)
    return np.where(np.isfinite(values), rounded, values)


def save(trace: Trace, path: Path) -> None:
    """Columns that never change are kept as one value."""
    columns: dict[str, Any] = {}
    for name in trace.records.dtype.names or ():
        values = trace.records[name]
        if name == "monotonic_seconds":
            continue
        constant = values.size and (values == values.flat[0]).all()
        columns[name] = values.flat[:1] if constant else values
    facts = {
        "case": asdict(trace.case),
        "step_seconds": trace.step_seconds,
        "hello": trace.hello.SerializeToString().hex(),
        "shape": trace.records.shape,
        "ends": trace.ends,
        "starts": trace.starts,
    }
    kept = np.flatnonzero(~np.isnan(trace.layer_norms).all(axis=1))
    file = io.BytesIO()
    arrays = {f"c_{name}": values for name, values in columns.items()}
    np.savez(file, facts=json.dumps(facts), kept=kept, norms=trace.layer_norms[kept], **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(file.getvalue(), preset=9))


def load(path: Path) -> Trace:
    """What `save` wrote; columns that are newer than the file are 0."""
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False) as arrays:
        facts = json.loads(str(arrays["facts"]))
        hello = pb.Hello.FromString(bytes.fromhex(facts["hello"]))
        records = np.zeros(tuple(facts["shape"]), RECORD)
        for name in RECORD.names or ():
            if f"c_{name}" in arrays:
                records[name] = arrays[f"c_{name}"]
        seconds = max(facts["step_seconds"], 1e-4)
        records["monotonic_seconds"] = np.where(
            records["sequence"] > 0, (np.arange(len(records)) * seconds)[:, None], 0.0
        )
        norms = np.full((len(records), len(hello.model.layers)), np.nan, np.float32)
        norms[arrays["kept"]] = arrays["norms"]
    known: dict[str, Any] = facts["case"]
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Trace(
        case=Case(**known),
        step_seconds=facts["step_seconds"],
        hello=hello,
        records=records,
        layer_norms=norms,
        ends=tuple(End(*values) for values in facts["ends"]),
        starts=tuple(facts.get("starts", (0,))),
    )


def path_of(case: Case) -> Path:
    """Where a case's trace lies."""
    return FOLDER / case.part / f"{case.name}.xz"


def all_traces(part: Part) -> list[Trace]:
    """Those that were recorded, by name."""
    return [load(path) for path in sorted((FOLDER / part).glob("*.xz"))]
