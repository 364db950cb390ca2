"""From the records of a node's ranks to blocks: one message for all of them. Pure: no clock, no file, no network."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from foreshock_protos.columns import MEASURED_NAMES, RECORD_COLUMNS, REDUCED_COLUMNS, WEIGHT_BLOCKS, Column, Part
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.batches import BatchPacker, loss_of
from foreshock_recorder.records import Record

_BLOCK_BYTES = 2**20
"""Of a message, about: a collector takes a few MiB at most."""
_LARGEST_WHOLE = 2.0**53


def _struct(columns: Iterable[Column], before: str = "<") -> struct.Struct:
    return struct.Struct(before + "".join("q" if column.integer else "d" for column in columns))


_POSITION = {name: i for i, name in enumerate(MEASURED_NAMES)}
_RECORD, _SUMS = _struct(RECORD_COLUMNS, "<q"), _struct(REDUCED_COLUMNS)
_MEASURED = tuple(_POSITION[column.name] for column in RECORD_COLUMNS if column.part is Part.MEASURED)
_WHOLE = tuple(i for i in _MEASURED if MEASURED_NAMES[i] in {c.name for c in RECORD_COLUMNS if c.integer})
_REDUCED = tuple(_POSITION[column.name] for column in REDUCED_COLUMNS)
_REDUCED_SEQUENCE = _POSITION["reduced_sequence"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Holds what one rank has to send at once: records whose sequence numbers follow each other, or none."""

    packer: BatchPacker
    launch: tuple[str, str]
    """Run and launch: only ranks of the same one share a block."""
    first_sequence: int
    records: Sequence[Record]
    dropped: dict[str, int]
    backward_passes: int

    @property
    def end(self) -> int:
        """The sequence number behind its last record."""
        return self.first_sequence + len(self.records)

    def part(self, first: int, end: int) -> Piece:
        """Return the part from one sequence number up to, but without, another."""
        records = self.records[first - self.first_sequence : end - self.first_sequence]
        return replace(self, first_sequence=first, records=records)


def blocks(pieces: Sequence[Piece]) -> Iterator[pb.FromRecorder]:
    """Pack what the ranks of a node have to send, in as few messages as their sequence numbers allow."""
    for launch in dict.fromkeys(piece.launch for piece in pieces):
        members = [piece for piece in pieces if piece.launch == launch]
        idle = [piece for piece in members if not piece.records]
        if idle:
            yield _block(idle)
        for first, end in pairwise(sorted({cut for piece in members for cut in (piece.first_sequence, piece.end)})):
            present = [piece for piece in members if piece.first_sequence <= first and end <= piece.end]
            if present:
                limit = _most_steps(present)
                for start in range(first, end, limit):
                    yield _block([piece.part(start, min(end, start + limit)) for piece in present])


def _most_steps(pieces: Sequence[Piece]) -> int:
    layer_bytes = 4 * (1 + len(WEIGHT_BLOCKS)) * max(piece.packer.layers for piece in pieces)
    return max(1, _BLOCK_BYTES // (_RECORD.size * len(pieces) + _SUMS.size + layer_bytes))


def _block(pieces: Sequence[Piece]) -> pb.FromRecorder:
    """Pack pieces of the same steps."""
    ranks = [
        pb.StepBlock.Rank(instance=piece.packer.instance, dropped=piece.dropped, backward_passes=piece.backward_passes)
        for piece in pieces
    ]
    block = pb.StepBlock(ranks=ranks, first_sequence=pieces[0].first_sequence, steps=len(pieces[0].records))
    steps = list(zip(*(piece.records for piece in pieces), strict=True))
    packers = [piece.packer for piece in pieces]
    block.records = b"".join(
        _record(packer, record) for step in steps for packer, record in zip(packers, step, strict=True)
    )
    block.sums = b"".join(map(_newest_sums, steps))
    for piece in pieces:
        if piece.packer.sends_layers:
            _add_layers(block, piece)
    return pb.FromRecorder(block=block)


def _record(packer: BatchPacker, record: Record) -> bytes:
    row = [0.0] * len(MEASURED_NAMES) if record.measured is None else record.measured.tolist()
    for i in _WHOLE:
        # Each travels as a float64 up to here, and not each of those is a whole number.
        row[i] = int(row[i]) if abs(row[i]) < _LARGEST_WHOLE else -1
    return _RECORD.pack(
        record.sequence,
        record.step,
        record.wall_seconds,
        record.monotonic_seconds,
        record.learning_rate,
        packer.flags(record),
        loss_of(record),
        *(row[i] for i in _MEASURED),
    )


def _newest_sums(records: Iterable[Record]) -> bytes:
    measured = [record.measured for record in records if record.measured is not None]
    known = [row for row in measured if 1 <= row[_REDUCED_SEQUENCE] < _LARGEST_WHOLE]
    if not known:
        return bytes(_SUMS.size)
    newest = max(known, key=lambda row: row[_REDUCED_SEQUENCE])
    sequence, *sums = (newest[i] for i in _REDUCED)
    return _SUMS.pack(int(sequence), *sums)


def _add_layers(block: pb.StepBlock, piece: Piece) -> None:
    layers, first = piece.packer.layers, len(MEASURED_NAMES)
    norms, weights = array("f"), array("f")
    for row, record in enumerate(piece.records):
        if record.measured is None:
            norms.extend([0.0] * layers)
            continue
        norms.extend(record.measured[first : first + layers])
        if record.weights is not None:
            block.weight_rows.append(row)
            weights.extend(record.weights)
    block.global_layer_norms, block.layer_weights = norms.tobytes(), weights.tobytes()
