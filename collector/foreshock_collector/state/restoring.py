"""Puts stored records back into a run's buffers: as evidence if their step is finalized, otherwise to wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreshock_collector.records.batch import decode
from foreshock_collector.records.block import Block, decode_block
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import Run
from foreshock_protos.v1 import telemetry_pb2 as pb


def restore(run: Run, instances: Mapping[str, Instance], name: str, message: bytes, now: float) -> None:
    """Put back the records of a stored message; of ranks that are not known, none. Raises `ColumnsError`.

    instances: of the run, by name. name: the instance of a batch; empty for a block.
    """
    if name:
        # An unknown one is of a damaged database: its recorder sends all records again.
        if (instance := instances.get(name)) is not None:
            batch = pb.StepBatch.FromString(message)
            _put([instance], run, Block.of_records(decode(batch, instance.layers)), now)
        return
    block = pb.StepBlock.FromString(message)
    known = {place: instances[rank.instance] for place, rank in enumerate(block.ranks) if rank.instance in instances}
    if known:
        members = list(known.values())
        _put(members, run, decode_block(block, members[0].layers).ranks(list(known)), now)


def _put(instances: Sequence[Instance], run: Run, block: Block, now: float) -> None:
    buffer = run.attempts[instances[0].attempt].buffer
    for piece in block.slices(buffer.capacity // 2):
        if buffer.must_finalize(int(piece.sequences[-1])) <= buffer.finalized:
            buffer.write_block([instance.rank for instance in instances], piece, now)
