"""A made-up job behind a real stream: what its ranks tell is arithmetic, how it is told is the wire's."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.columns import WEIGHT_BLOCKS, WIRE_NAMES
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_protos.v1 import telemetry_pb2_grpc as rpc

LAYERS = (
    "tok_embeddings", *(f"blocks.{i}.{part}" for i in range(4) for part in ("attention", "mlp")), "norm", "output"
)  # fmt: skip
MAX_NORM = 1.5
LOUD_LAYER = 6
LOUD_RANK = 2


class Job:
    """Ranks of one run, told by one recorder."""

    def __init__(
        self, address: str, run: str, *, ranks: int = 4, experiment: str = "gpt-small", layers: tuple[str, ...] = LAYERS
    ) -> None:
        self.run, self.ranks, self.layers = run, ranks, layers
        self.sent = 0
        self._random = np.random.default_rng(7)
        self._queue: queue.SimpleQueue[pb.FromRecorder | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        self._acks: Any = rpc.TelemetryStub(self._channel).Stream(self._messages())  # type: ignore[no-untyped-call]
        self._began = time.time()
        model = pb.ModelSummary(
            type="Transformer",
            module_types={"Linear": 24, "RMSNorm": 9, "Embedding": 1},
            layers=layers,
            parameters=[f"{layer}.weight" for layer in layers],
            parameter_sizes=[589_824] * len(layers),
            parameter_layers=range(len(layers)),
        )
        for rank in range(ranks):
            hello = pb.Hello(
                schema_version=SCHEMA_VERSION,
                instance=f"{run}-{rank}",
                run=run,
                experiment=experiment,
                launch_id=f"{run}-launch",
                started_seconds=self._began,
                topology=pb.Topology(rank=rank, local_rank=rank % 8, world_size=ranks, node=f"node{rank // 8}"),
                model=model,
                optimizer=pb.OptimizerSummary(type="AdamW", fused=True),
                clip=f"norm {MAX_NORM}",
                versions={"foreshock": "0.1.0", "torch": "2.13.0", "python": "3.11"},
                pid=4000 + rank,
            )
            self._queue.put(pb.FromRecorder(hello=hello))

    def _messages(self) -> Iterator[pb.FromRecorder]:
        while (message := self._queue.get()) is not None:
            yield message

    def train(self, count: int, *, explode: bool = False, nan: bool = False) -> None:
        """So many steps more. explode: the norm doubles at each of them; nan: the last one is not finite."""
        first = self.sent + 1
        self.sent += count
        steps = np.arange(first, first + count)
        # The norm falls as training settles; a batch now and then is harder.
        climb = 2.0 ** np.arange(1, count + 1) if explode else np.ones(count)
        norms = (0.6 + 2.0 * np.exp(-steps / 90)) * np.exp(0.07 * self._random.standard_normal(count)) * climb
        losses = 2.4 + 6.5 * np.exp(-steps / 160) + 0.05 * self._random.standard_normal(count) + 0.15 * np.log(climb)
        shares = np.exp(0.08 * self._random.standard_normal((count, len(self.layers)))) / math.sqrt(len(self.layers))
        if explode:
            shares[:, LOUD_LAYER % len(self.layers)] *= np.minimum(climb, 30)
        # Updates grow with the gradient, and those of one layer most.
        measured = steps % 10 == 1
        updates = 1e-3 * (1 + 0.1 * np.sin(steps)) * np.minimum(climb, 30)
        by_layer = updates[:, None] * np.ones(len(self.layers))
        by_layer[:, LOUD_LAYER % len(self.layers)] *= np.minimum(climb, 5)
        bad = np.zeros(count, bool)
        bad[-1] = nan
        for rank in range(self.ranks):
            locals_ = norms * 1.6 * np.exp(0.08 * self._random.standard_normal(count))
            if explode and rank == LOUD_RANK:
                locals_ *= 7
            batch = pb.StepBatch(instance=f"{self.run}-{rank}", first_sequence=first)
            columns: dict[str, Any] = dict.fromkeys(WIRE_NAMES, np.zeros(count))
            columns |= {
                "step": steps,
                "wall_seconds": self._began + 0.3 * steps,
                "monotonic_seconds": 0.3 * steps,
                "learning_rate": 3e-4 * np.minimum(1, steps / 120),
                "flags": np.full(count, pb.LOSS_OBSERVED | pb.LOCAL_NORMS),
                "loss": np.where(bad, np.nan, losses) if rank == LOUD_RANK else losses,
                "loss_scale": np.ones(count),
                "global_norm": np.where(bad, np.nan, norms),
                "clip_coefficient": np.where(bad, 1.0, np.minimum(1, MAX_NORM / norms)),
                "local_norm": np.where(bad & (rank == LOUD_RANK), np.nan, locals_),
                "global_nan_parameters": bad * 3.0,
                "local_nan_parameters": bad * 3.0 if rank == LOUD_RANK else np.zeros(count),
                "parameter_norm": measured * (60 + 0.01 * steps),
                "update_ratio": measured * updates,
                "first_moment_norm": measured * 0.2,
                "second_moment_norm": measured * 0.8,
                "first_nonfinite_global": np.where(bad, LOUD_LAYER % len(self.layers), -1),
                "first_nonfinite_local": np.where(bad & (rank == LOUD_RANK), LOUD_LAYER % len(self.layers), -1),
            }
            for name, values in columns.items():
                getattr(batch, name)[:] = values.astype(int).tolist() if name in ("step", "flags") else values.tolist()
            if rank == 0:
                told = np.where(bad[:, None], np.nan, shares * norms[:, None])
                batch.global_layer_norms[:] = told.ravel().tolist()
                batch.weight_rows[:] = np.flatnonzero(measured).tolist()
                values = [np.full((measured.sum(), len(self.layers)), 20.0), by_layer[measured]]
                values += [np.full_like(values[0], 0.05), np.full_like(values[0], 0.2)]
                for name, block in zip(WEIGHT_BLOCKS, values, strict=True):
                    getattr(batch, name)[:] = block.ravel().tolist()
            self._queue.put(pb.FromRecorder(steps=batch))

    def stored(self) -> float:
        """Wait until all that was sent is stored; the time."""
        waiting = {f"{self.run}-{rank}" for rank in range(self.ranks)}
        while waiting:
            for position in next(self._acks).positions:
                if position.sequence >= self.sent:
                    waiting.discard(position.instance)
        return time.time()

    def finish(self) -> None:
        """All ranks say goodbye, and the stream ends."""
        for rank in range(self.ranks):
            goodbye = pb.Exit(instance=f"{self.run}-{rank}", reason=pb.ExitReason.FINISHED, last_sequence=self.sent)
            self._queue.put(pb.FromRecorder(exit=goodbye))
        self.close()
        for _ in self._acks:
            pass

    def close(self) -> None:
        """The recorder goes without a word."""
        self._queue.put(None)

    def leave(self) -> None:
        """Cancel the stream and close."""
        self.close()
        self._acks.cancel()
        self._channel.close()
