"""Ranks that exist only as messages: what a recorder would send for them, and the stream that sends it."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
import numpy as np

from benchmarks.load.block_messages import RECORD, SUMS
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import COLUMNS, RECORD_COLUMNS, REDUCED_COLUMNS
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub

_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
"""A connection for each stream, as recorders on different machines have."""
_RETRY_SECONDS = 1.0
_DEFAULTS = {column.name: column.missing for column in COLUMNS if column.on_wire and not column.optional}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes of a simulated job."""

    ranks: int
    """Of all runs together."""
    ranks_per_run: int
    ranks_per_stream: int
    """Ranks whose recorder is the same, as those of a node."""
    rate: float
    """Steps a second of each rank."""
    layers: int = 16
    blocks: bool = True
    """Whether recorders send all their ranks in one message, as they do since schema version 2."""

    @property
    def runs(self) -> int:
        """How many runs these ranks are."""
        return math.ceil(self.ranks / self.ranks_per_run)

    def streams(self) -> Iterator[list[Rank]]:
        """Yield the ranks of each stream."""
        world = min(self.ranks_per_run, self.ranks)
        ranks = [
            Rank(run=f"run{number // world}", rank=number % world, world=world, layers=self.layers)
            for number in range(self.ranks)
        ]
        for start in range(0, len(ranks), self.ranks_per_stream):
            yield ranks[start : start + self.ranks_per_stream]


@dataclass(kw_only=True)
class Rank:
    """One rank and how far it has come."""

    run: str
    rank: int
    world: int
    layers: int
    sent: int = 0
    """Number of its newest step that was sent."""
    stored: int = 0
    """Number up to which the collector has acknowledged."""
    refused: str = ""

    @property
    def instance(self) -> str:
        return f"{self.run}-{self.rank}"

    def hello(self) -> pb.FromRecorder:
        """Return its first message."""
        names = [f"blocks.{number}" for number in range(self.layers)]
        return pb.FromRecorder(
            hello=pb.Hello(
                schema_version=SCHEMA_VERSION,
                instance=self.instance,
                experiment="load",
                run=self.run,
                launch_id=f"{self.run}-launch",
                started_seconds=time.time(),
                topology=pb.Topology(
                    rank=self.rank, local_rank=self.rank % 8, world_size=self.world, node=f"node{self.rank // 8}"
                ),
                model=pb.ModelSummary(
                    type="Transformer",
                    parameters=[f"{name}.weight" for name in names],
                    parameter_sizes=[1_000_000] * self.layers,
                    layers=names,
                    parameter_layers=range(self.layers),
                ),
                optimizer=pb.OptimizerSummary(type="AdamW", fused=True),
                clip="none",
                capabilities=["local_norms"],
                pid=1,
            )
        )

    def columns(self, count: int, rate: float, *, nonfinite: bool = False) -> dict[str, Sequence[float]]:
        """Return the columns of its next steps, calm ones, as far as they are not the default."""
        first = self.sent + 1
        numbers = range(first, first + count)
        norms = [1.0 + 0.05 * (number * 7919 % 97) / 97 for number in numbers]
        losses = [2.0 + 0.1 * random.random() for _ in numbers]
        if nonfinite:
            norms[-1] = losses[-1] = float("nan")
        now = time.time()
        return {
            "step": [number - 1 for number in numbers],
            "wall_seconds": [now - (first + count - 1 - number) / rate for number in numbers],
            "monotonic_seconds": [number / rate for number in numbers],
            "learning_rate": [1e-3] * count,
            "flags": [pb.LOSS_OBSERVED | pb.LOCAL_NORMS] * count,
            "loss": losses,
            "global_norm": norms,
            "local_norm": [norm * (1.0 + 0.2 * random.random()) for norm in norms],
            "reduced_sequence": [max(number - 1, 1) for number in numbers],
            "reduced_square_sum": [1.0 * self.world] * count,
            "reduced_loss_sum": [2.05 * self.world] * count,
            "reduced_loss_count": [self.world] * count,
        }

    def batch(self, count: int, rate: float, *, nonfinite: bool = False) -> pb.FromRecorder:
        """Return its next steps, calm ones. nonfinite: the last one's gradient and loss are NaN."""
        first, values = self.sent + 1, self.columns(count, rate, nonfinite=nonfinite)
        norms = values["global_norm"]
        batch = pb.StepBatch(instance=self.instance, first_sequence=first)
        for name, default in _DEFAULTS.items():
            getattr(batch, name).extend(values.get(name, [default] * count))
        # The averaged gradient is the same everywhere, and rank 0 alone sends its layers.
        share = self.layers**-0.5
        if self.rank == 0:
            batch.global_layer_norms.extend(norm * share for norm in norms for _ in range(self.layers))
        batch.local_layer_norms.extend(norm * share for norm in norms for _ in range(self.layers))
        self.sent += count
        return pb.FromRecorder(steps=batch)


def block(ranks: Sequence[Rank], count: int, rate: float) -> pb.FromRecorder:
    """Return the next steps of ranks that stand at the same one, in one message."""
    first, values = ranks[0].sent + 1, [rank.columns(count, rate) for rank in ranks]
    records, sums = np.zeros((count, len(ranks)), RECORD), np.zeros(count, SUMS)
    records["sequence"] = np.arange(first, first + count)[:, None]
    for column in RECORD_COLUMNS:
        told = values[0].get(column.name)
        records[column.name] = column.missing if told is None else np.transpose([each[column.name] for each in values])
    for column in REDUCED_COLUMNS:
        sums[column.name] = values[0].get(column.name, column.missing)
    found = pb.StepBlock(
        ranks=[pb.StepBlock.Rank(instance=rank.instance) for rank in ranks],
        first_sequence=first,
        steps=count,
        records=records.tobytes(),
        sums=sums.tobytes(),
    )
    if any(rank.rank == 0 for rank in ranks):
        norms = np.array(values[0]["global_norm"], "<f4") * ranks[0].layers ** -0.5
        found.global_layer_norms = np.repeat(norms, ranks[0].layers).tobytes()
    for rank in ranks:
        rank.sent += count
    return pb.FromRecorder(block=found)


@dataclass(kw_only=True)
class SimulatedRecorder:
    """Sends the steps of some ranks on one stream."""

    ranks: list[Rank]
    flush_seconds: float = field(default=1.0, init=False)
    """Between two messages of a rank, as the collector last asked for."""
    refusals: int = field(default=0, init=False)
    """Times that the collector had no room for the stream."""
    failure: str = field(default="", init=False)
    """Why the stream ended early."""

    async def run(self, address: str, job: Job, *, start: float, seconds: float, linger: float) -> None:
        """Send from `start`, Unix time, for so many seconds; then wait at most `linger` for acknowledgements."""
        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            while not self.failure:
                call = TelemetryStub(channel).Stream()  # type: ignore[no-untyped-call]
                listener = asyncio.create_task(self._listen(call))
                try:
                    await self._send(call, job, start=start, end=start + seconds)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._all_stored(listener), linger)
                    await call.done_writing()
                    return
                except grpc.aio.AioRpcError as error:
                    await self._ended(error)
                except asyncio.InvalidStateError:
                    # A write to a stream that has ended: its status says why.
                    await self._ended(call)
                finally:
                    listener.cancel()

    async def _ended(self, call: grpc.aio.Call | grpc.aio.AioRpcError) -> None:
        status = call.code() if isinstance(call, grpc.aio.AioRpcError) else await call.code()
        details = call.details() if isinstance(call, grpc.aio.AioRpcError) else await call.details()
        if status is grpc.StatusCode.RESOURCE_EXHAUSTED and not any(rank.sent for rank in self.ranks):
            self.refusals += 1
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            self.failure = f"{status}: {details}"

    async def _listen(self, call: grpc.aio.StreamStreamCall) -> None:
        by_instance = {rank.instance: rank for rank in self.ranks}
        async for ack in call:
            self.flush_seconds = ack.flow.flush_interval_seconds or self.flush_seconds
            for position in ack.positions:
                rank = by_instance[position.instance]
                rank.stored = max(rank.stored, position.sequence)
                rank.refused = position.refused

    async def _send(self, call: grpc.aio.StreamStreamCall, job: Job, *, start: float, end: float) -> None:
        for rank in self.ranks:
            await call.write(rank.hello())
        # Recorders flush at moments of their own.
        following = start + random.random() * self.flush_seconds
        while following < end:
            await asyncio.sleep(max(0.0, following - time.time()))
            count = max(1, round(job.rate * self.flush_seconds))
            for message in self._messages(count, job):
                await call.write(message)
            following += count / job.rate

    def _messages(self, count: int, job: Job) -> Iterator[pb.FromRecorder]:
        if not job.blocks:
            yield from (rank.batch(count, job.rate) for rank in self.ranks)
            return
        for run in dict.fromkeys(rank.run for rank in self.ranks):
            yield block([rank for rank in self.ranks if rank.run == run], count, job.rate)

    async def _all_stored(self, listener: asyncio.Task[None]) -> None:
        while any(rank.stored < rank.sent and not rank.refused for rank in self.ranks) and not listener.done():
            await asyncio.sleep(0.1)
