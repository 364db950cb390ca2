"""Messages as recorders of each version of the contract have sent them, of a job whose last step has a NaN.

`python -m tests.support.recorded_messages` records those of this version.
"""

from __future__ import annotations

import base64
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.paths import ring_name
from foreshock_recorder.ring import Ring
from tests.support.rings import LAYERS, identity, step

FOLDER = Path(__file__).parents[1] / "collector/ingest/recorded"
RUN = "recorded"
RANKS, STEPS, _WEIGHTS_AT = 2, 12, 10


def recorded(path: Path) -> list[bytes]:
    """Return the messages of a file, in the order in which they were sent."""
    return [base64.b64decode(line) for line in path.read_text().splitlines()]


def _record() -> list[bytes]:
    """Let a recorder deliver the rings of a job that has ended. Return what it sends."""
    messages: list[bytes] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / RUN / "launch"
        for rank in range(RANKS):
            _leave(folder, rank)
        server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(
            lambda requests, _: _acknowledged(requests, messages), response_serializer=pb.Ack.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("foreshock.v1.Telemetry", {"Stream": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        command = ("-m", "foreshock_recorder", "--folder", str(folder), "--collector", f"127.0.0.1:{port}")
        subprocess.run([sys.executable, *command], check=True)
        server.stop(None).wait()
    return messages


def _leave(folder: Path, rank: int) -> None:
    """Write the ring of a rank that has ended."""
    said = identity(
        rank, run=RUN, instance=f"{RUN}-{rank}", launch_id="launch", token=f"secret-{rank}", world_size=RANKS
    )
    ring = Ring.create(folder / ring_name("launch", rank), said, layers=LAYERS)
    for sequence in range(1, STEPS + 1):
        ring.count_backward_pass()
        if sequence == _WEIGHTS_AT:
            ring.write_weights(sequence, [float(i) for i in range(len(WEIGHT_BLOCKS) * LAYERS)])
        last = {"global_norm": math.nan, "global_nan_parameters": 2.0} if sequence == STEPS else {}
        step(ring, sequence, **last)
    ring.write_exit(ExitReason.FINISHED)


def _acknowledged(requests: Iterator[bytes], messages: list[bytes]) -> Iterator[pb.Ack]:
    """Keep each message, and acknowledge it."""
    positions: dict[str, pb.Ack.Position] = {}
    for data in requests:
        messages.append(data)
        message: Any = pb.FromRecorder.FromString(data)
        which = message.WhichOneof("message")
        inner = getattr(message, which)
        ranks = inner.ranks if which == "block" else [inner]
        for instance in (rank.instance for rank in ranks):
            position = positions.setdefault(instance, pb.Ack.Position(instance=instance, run=RUN))
            position.sequence = STEPS if which in ("block", "steps") else position.sequence
            position.closed |= which == "exit"
        yield pb.Ack(epoch="one", positions=positions.values(), schema_version=SCHEMA_VERSION)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    lines = [base64.b64encode(message).decode() for message in _record()]
    (FOLDER / f"schema_{SCHEMA_VERSION}.txt").write_text("".join(f"{line}\n" for line in lines))
