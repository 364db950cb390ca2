"""A recorded case: small enough to be committed, and whole enough to be told to a collector again."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.faults.cases import Case, Part
from foreshock_collector.records.batch import RECORD, Rows, decode, locally_nonfinite
from foreshock_protos.v1 import telemetry_pb2 as pb

FOLDER = Path(__file__).parent / "traces"
KEPT_BITS = 12
"""Of a number's mantissa: 1 part in 8,000, far below what any rule judges by."""
_EXACT = ("parameter_fingerprint",)
_CLOCKS = ("wall_seconds", "monotonic_seconds")
_BEFORE, _AFTER, _EVERY = 80, 20, 50
"""Layer norms are kept for so many steps around the first that is not finite, and for one in so many elsewhere."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the ranks of a case told."""

    case: Case
    step_seconds: float
    """Median time of a step: clocks are not kept."""
    hello: pb.Hello
    """Of rank 0."""
    records: Rows
    """[steps, ranks], as on the collector's buffer; sequence 0 where that rank has no record."""
    layer_norms: NDArray[np.float32]
    """[steps, layers] of the averaged gradient; NaN where they were not kept."""
    ends: tuple[tuple[int, str, str], ...]
    """Rank, reason and detail of each exit, in the order they came; reason LOST also where only the event came."""

    def hellos(self) -> Iterator[pb.Hello]:
        """One per rank."""
        for rank in range(self.case.ranks):
            hello = pb.Hello()
            hello.CopyFrom(self.hello)
            hello.instance, hello.topology.rank = f"{self.case.name}-{rank}", rank
            yield hello

    def batches(self) -> Iterator[tuple[int, pb.StepBatch]]:
        """Rank and batch, in the order of steps."""
        for start in range(0, len(self.records), _BATCH):
            for rank in range(self.case.ranks):
                rows = self.records[start : start + _BATCH, rank]
                kept = rows["sequence"] > 0
                if kept.any():
                    norms = self.layer_norms[start : start + _BATCH][kept]
                    yield rank, self._batch(rank, rows[kept], norms if rank == 0 else norms[:0])

    def _batch(self, rank: int, rows: Rows, norms: NDArray[np.float32]) -> pb.StepBatch:
        batch = pb.StepBatch(instance=f"{self.case.name}-{rank}", first_sequence=int(rows["sequence"][0]))
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
    ranks = {name: hello.topology.rank for name, hello in hellos.items()}
    if not hellos:
        raise ValueError("no rank said hello")
    hello = next(hello for hello in hellos.values() if hello.topology.rank == 0)
    layers = len(hello.model.layers)
    found: list[tuple[int, Rows, Any]] = []
    ends: dict[int, tuple[int, str, str]] = {}
    for message in messages:
        which = message.WhichOneof("message")
        if which == "steps" and len(message.steps.step):
            decoded = decode(message.steps, layers)
            found.append((ranks[message.steps.instance], decoded.rows, decoded.layer_norms))
        elif which == "exit":
            rank, exit_message = ranks[message.exit.instance], message.exit
            ends.setdefault(rank, (rank, pb.ExitReason.Name(exit_message.reason), exit_message.detail))
        elif which == "event" and message.event.kind == pb.Event.RANK_LOST:
            rank = ranks[message.event.instance]
            ends.setdefault(rank, (rank, "LOST", ""))
    if not found:
        raise ValueError("no steps were told")
    length = max(int(rows["sequence"][-1]) for _, rows, _ in found)
    records = np.zeros((length, case.ranks), RECORD)
    norms = np.full((length, layers), np.nan, np.float32)
    for rank, rows, told in found:
        records[rows["sequence"] - 1, rank] = rows
        if told is not None:
            norms[rows["sequence"] - 1] = told
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
    known = facts["case"] | {"restarts": tuple(facts["case"]["restarts"])}
    return Trace(
        case=Case(**known),
        step_seconds=facts["step_seconds"],
        hello=hello,
        records=records,
        layer_norms=norms,
        ends=tuple((rank, reason, detail) for rank, reason, detail in facts["ends"]),
    )


def path_of(case: Case) -> Path:
    """Where a case's trace lies."""
    return FOLDER / case.part / f"{case.name}.xz"


def all_traces(part: Part) -> list[Trace]:
    """Those that were recorded, by name."""
    return [load(path) for path in sorted((FOLDER / part).glob("*.xz"))]
