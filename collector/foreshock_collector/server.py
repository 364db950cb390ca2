"""The collector put together: gRPC and HTTP on one loop, over one state and one database."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from foreshock_collector.config import Config, ConfigError
from foreshock_collector.exposition import Retention, RunSeries
from foreshock_collector.intake import Intake
from foreshock_collector.service import Telemetry, make_server
from foreshock_collector.store import Store
from foreshock_collector.web import Pages

_DRAIN_SECONDS = 2.0


class Server:
    """`async with Server(config) as server:` listens until the block ends, then drains."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.grpc_port = 0
        self.http_port = 0

    async def __aenter__(self) -> Self:
        config = self._config
        self._store = Store(config.database)
        runs = self._store.load(time.time())
        registry = CollectorRegistry()
        retention = Retention(ended_seconds=config.retention_seconds)
        registry.register(RunSeries(runs, time.time, time.time(), retention))
        intake = Intake(runs, self._store, time.time)
        self._telemetry = Telemetry(
            intake, self._store.epoch, ack_seconds=config.ack_seconds, page_url=lambda: self.url
        )
        self._grpc: Any = make_server(self._telemetry)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        try:
            self.grpc_port = self._grpc.add_insecure_port(_joined(config.host, config.grpc_port))
        except RuntimeError as error:
            raise ConfigError(f"--grpc-port {config.grpc_port} on {config.host} cannot be listened on") from error
        self._pages = Pages(
            runs=runs, store=self._store, registry=registry, clock=time.time, silent=retention.silent_seconds
        )
        self._runner = web.AppRunner(self._pages.application(), access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, config.host, config.http_port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(f"--http-port {config.http_port} on {config.host}: {error.strerror}") from error
        self.http_port = self._runner.addresses[0][1]
        await self._grpc.start()
        self.committer = asyncio.create_task(self._telemetry.committer())
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._pages.ready = True
        return self

    @property
    def url(self) -> str:
        """Where people and Prometheus look."""
        return f"http://{_joined(self._config.host, self.http_port)}"

    @property
    def address(self) -> str:
        """Where recorders connect."""
        return _joined(self._config.host, self.grpc_port)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pages.ready = False
        await self._health.enter_graceful_shutdown()
        self.committer.cancel()
        await asyncio.gather(self.committer, return_exceptions=True)
        await self._telemetry.drain()
        await self._grpc.stop(_DRAIN_SECONDS)
        await self._runner.cleanup()
        self._store.close()


async def serve(config: Config) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Server(config) as server:
        print(f"foreshock collector: records to {server.address}, people to {server.url}", flush=True)  # noqa: T201
        if config.ready_file:
            draft = Path(config.ready_file + ".draft")
            draft.write_text(json.dumps({"grpc": server.address, "http": server.url}))
            draft.rename(config.ready_file)
        stopping = asyncio.create_task(stop.wait())
        # A collector that no longer commits must not look alive: end, loudly, and let the supervisor start another.
        await asyncio.wait((stopping, server.committer), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if server.committer.done():
            server.committer.result()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
