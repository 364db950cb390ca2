"""A collector for the recorder's tests: real gRPC on a free port, stores what it is sent, fails as told."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from foreshock_protos.retry import retry_metadata
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_protos.v1.telemetry_pb2_grpc import add_TelemetryServicer_to_server
from tests.support.waiting import WAIT_SECONDS, free_port


@dataclass
class Told:
    """All that was said about one instance, in order of arrival."""

    hellos: list[pb.Hello] = field(default_factory=list)
    batches: list[pb.StepBatch] = field(default_factory=list)
    events: list[pb.Event] = field(default_factory=list)
    exits: list[pb.Exit] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def sequences(self) -> list[int]:
        """Of every row, in order of arrival."""
        return [batch.first_sequence + i for batch in self.batches for i in range(len(batch.step))]


class FakeCollector:
    """Answers every message at once. Attributes say how it fails; change them at any time."""

    def __init__(self) -> None:
        self.told: defaultdict[str, Told] = defaultdict(Told)
        self.position: defaultdict[str, int] = defaultdict(int)
        self.closed: set[str] = set()
        self.streams = 0
        self.stores = 10**9
        """The highest sequence number that it stores."""
        self.answers = True
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.retry_seconds = 0.0
        """After which a refused stream is asked to try again; 0: it is not."""
        self.refused: dict[str, str] = {}
        """Instances that it does not take in, and why."""
        self.renamed: dict[str, str] = {}
        """Runs that it calls otherwise."""
        self.flow = pb.FlowControl()
        self.schema_version = 0
        """Newest version that it says it understands; 0: it says nothing, as one of the first version."""
        self.blocks: list[pb.StepBlock] = []
        """Every block with steps, in order of arrival."""
        self.address = f"127.0.0.1:{free_port()}"
        self._held = threading.Event()
        self._changed = threading.Condition()
        self._server: Any = None

    def start(self) -> FakeCollector:
        """Listen, on the same port each time."""
        self._server = grpc.server(ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
        add_TelemetryServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(self.address)
        self._server.start()
        return self

    def stop(self) -> None:
        """Vanish at once."""
        if self._server is not None:
            self._server.stop(None).wait(WAIT_SECONDS)
            self._server = None

    def hold(self) -> None:
        """Take nothing in from now on, until it vanishes."""
        self._held.set()

    def forget(self) -> None:
        """Go on with an empty database."""
        with self._changed:
            self.told.clear()
            self.position.clear()
            self.closed.clear()

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until it holds; asked anew after each message."""
        with self._changed:
            assert self._changed.wait_for(what, WAIT_SECONDS), dict(self.told)

    def Stream(self, requests: Iterator[pb.FromRecorder], context: Any) -> Iterator[pb.Ack]:  # noqa: N802 - gRPC's name
        """Handle one recorder."""
        with self._changed:
            self.streams += 1
            self._changed.notify_all()
        if self.refusal is not None:
            # Where a client's write meets the end of its stream, gRPC may lose the status.
            next(requests, None)
            if self.retry_seconds:
                code, text = self.refusal
                context.set_trailing_metadata(retry_metadata(code.value[0], text, self.retry_seconds))
            context.abort(*self.refusal)
        greeted: set[str] = set()
        if self._held.is_set():
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait(WAIT_SECONDS)
        try:
            for message in requests:
                with self._changed:
                    greeted |= self._take_block(message.block) if message.HasField("block") else {self._take(message)}
                    ack = self._ack(greeted)
                    self._changed.notify_all()
                if self.answers:
                    yield ack
        except grpc.RpcError:
            pass  # the recorder is gone

    def _take_block(self, block: pb.StepBlock) -> set[str]:
        instances = {rank.instance for rank in block.ranks}
        if block.steps:
            self.blocks.append(block)
            last = block.first_sequence + block.steps - 1
            self.position |= {name: min(max(self.position[name], last), self.stores) for name in instances}
            self.closed -= instances
        return instances

    def _take(self, message: pb.FromRecorder) -> str:
        which = message.WhichOneof("message")
        assert which is not None
        inner: Any = getattr(message, which)
        told = self.told[inner.instance]
        told.order.append(which)
        kept: dict[str, list[Any]] = {
            "hello": told.hellos, "steps": told.batches, "event": told.events, "exit": told.exits
        }  # fmt: skip
        kept[which].append(inner)
        if which == "steps" and inner.step:
            last = inner.first_sequence + len(inner.step) - 1
            self.position[inner.instance] = min(max(self.position[inner.instance], last), self.stores)
            self.closed.discard(inner.instance)
        if which == "exit":
            self.closed.add(inner.instance)
        return str(inner.instance)

    def _ack(self, instances: set[str]) -> pb.Ack:
        positions = [self._position(name) for name in sorted(instances)]
        return pb.Ack(
            epoch="one",
            positions=positions,
            flow=self.flow,
            page_url="http://monitor:9327",
            schema_version=self.schema_version,
        )

    def _position(self, name: str) -> pb.Ack.Position:
        if name in self.refused:
            return pb.Ack.Position(instance=name, refused=self.refused[name])
        asked = self.told[name].hellos[0].run
        return pb.Ack.Position(
            instance=name,
            sequence=self.position[name],
            closed=name in self.closed,
            run=self.renamed.get(asked, asked),
        )
