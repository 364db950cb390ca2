"""A collector that also keeps what recorders send, message by message: the corpus is recorded through the real path."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from foreshock_collector.ingest.flow import Flow
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.service import Telemetry, make_server
from foreshock_collector.ingest.session import Session
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb

_ACK_SECONDS = 0.2


class Tape(Intake):
    """Everything that was taken, in order, by run."""

    def __init__(self, runs: Runs, store: Store, clock: Callable[[], float]) -> None:
        super().__init__(runs, store, clock, ended_seconds=1e6, silent=1e6)
        self.messages: dict[str, list[pb.FromRecorder]] = defaultdict(list)
        self.exits: Counter[str] = Counter()
        """Ranks whose end was received, and hence all of their records before, by run."""
        self._runs_of: dict[str, str] = {}

    def apply(self, message: pb.FromRecorder, session: Session) -> None:
        super().apply(message, session)
        which = message.WhichOneof("message")
        if which == "hello":
            self._runs_of[message.hello.instance] = message.hello.run
        # The ranks of a block are of one launch.
        content = message.block.ranks[0] if which == "block" else getattr(message, which)
        run = self._runs_of[content.instance]
        self.messages[run].append(message)
        self.exits[run] += which == "exit"


class TapeServer:
    """In a thread of its own, on loopback."""

    def __init__(self) -> None:
        self.tape: Tape
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> TapeServer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        store = Store(":memory:")
        self.tape = Tape(Runs(), store, time.time)
        telemetry = Telemetry(self.tape, store.epoch, flow=Flow(_ACK_SECONDS), page_url=lambda: "")
        server: Any = make_server(telemetry)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        committer = asyncio.create_task(telemetry.committer())
        self._ready.set()
        await self._stop.wait()
        committer.cancel()
        await asyncio.wait([committer])
        await server.stop(1.0)
        store.close()
