"""The collector process: gRPC and HTTP on one event loop, over one state and one database."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import logging
import resource
import signal
import socket
import sqlite3
import urllib.parse
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, ProcessCollector

from foreshock_collector.access.certificates import Certificates
from foreshock_collector.access.tokens import Tokens, TokensError
from foreshock_collector.clock import SystemClock
from foreshock_collector.config import Config, ConfigError, address_of, is_loopback, public_host, secret_from
from foreshock_collector.ingest.flow import Flow
from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.service import Telemetry, make_server
from foreshock_collector.ingest.statistics import IngestStatistics
from foreshock_collector.notify.notifier import Notifier, notifying
from foreshock_collector.notify.statistics import NotificationStatistics
from foreshock_collector.state import recovery
from foreshock_collector.state.database_file import GoneError
from foreshock_collector.state.retention import Retention
from foreshock_collector.state.store import Store
from foreshock_collector.web.app import WebApplication
from foreshock_collector.web.collector_series import CollectorSeries
from foreshock_collector.web.connections import BEGIN_SECONDS
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.otlp import OtlpExport
from foreshock_collector.web.rendering import Renderer

VERSION = importlib.metadata.version("foreshock")
logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 2.0
OBJECTS_PER_COLLECTION = 10_000
"""After which Python looks for reference cycles. With its 700, that took 7% of a busy collector's time."""
_SERVICES = ("", "foreshock.v1.Telemetry")


class Server:
    """Runs a collector: `async with Server(config) as server:` listens until the block ends, then drains.

    Raises `ConfigError` or `StoreError` if it cannot start. clock: returns Unix time; by default, the machine's.
    """

    def __init__(self, config: Config, clock: Callable[[], float] | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._certificates = _certificates(config)
        self._stack = AsyncExitStack()
        self.grpc_port = 0
        self.http_port = 0
        self.otlp_export: OtlpExport | None = None
        self.store: Store
        self.committer: asyncio.Task[None]
        """Ends only with an error; then nothing is stored any more."""

    async def __aenter__(self) -> Self:
        # Each part registers how it ends: in the reverse order, also when a later part cannot start.
        async with self._stack as stack:
            config, clock = self._config, self._clock
            tokens = _tokens(config, clock)
            now = clock()
            self.store, runs = recovery.load(
                config.database,
                now,
                config.rules_of,
                archive_before=now - config.silent_seconds - config.retention_seconds,
            )
            store = self.store
            stack.callback(store.close)
            limits = {"ended_seconds": config.retention_seconds, "silent": config.silent_seconds}
            retention = Retention(
                store,
                seconds=config.history_days * 86400,
                most_bytes=config.database_gigabytes * 1e9,
                silent=config.silent_seconds,
            )
            jumped = clock.jumped if isinstance(clock, SystemClock) else _never
            intake = Intake(
                runs, store, clock, **limits, jumped=jumped, retention=retention, most_runs=config.most_runs
            )
            registry = CollectorRegistry()
            series, notifications = RunSeries(runs, clock, **limits, most=config.run_series), NotificationStatistics()
            registry.register(series)
            itself = CollectorSeries(
                *(intake.statistics, runs.errors, store.size_bytes, clock),
                notifications=notifications,
                version=VERSION,
            )
            registry.register(itself)
            process = ProcessCollector(registry=registry)
            application = WebApplication(
                runs=runs,
                store=store,
                render=Renderer((series, itself), process).render_in_parts,
                urgent_commits=lambda: intake.statistics.urgent_commits,
                clock=clock,
                silent=config.silent_seconds,
                cache_seconds=config.metrics_cache_seconds,
                storing=lambda: intake.storing,
                hosts=self._hosts(),
                tokens=tokens,
            )
            telemetry = Telemetry(
                intake,
                store.epoch,
                flow=Flow(config.ack_seconds),
                page_url=lambda: self.public_url,
                tokens=tokens,
            )
            notifier: Notifier | None = None
            # Entered before the servers, so that it ends after them: their last commit may bring news.
            if config.notify_url:
                notifier = await stack.enter_async_context(
                    notifying(
                        *(series.facts, notifications, clock),
                        target=config.notify_url,
                        secret=secret_from(config.notify_secret),
                        form=config.notify_format,
                        url=lambda: self.public_url,
                    )
                )
            # HTTP first: acknowledgements tell ranks the page's address, with its port.
            await self._open_http(stack, application)
            await self._open_grpc(stack, telemetry)
            if notifier is not None:
                # Not before it listens: the links in messages have its port.
                stack.push_async_callback(_cancel, asyncio.create_task(notifier.evaluate_forever()))
            self.otlp_export = self._otlp_export(registry, intake.statistics)
            if self.otlp_export is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(self.otlp_export.run()))
            self.committer = asyncio.create_task(telemetry.committer())
            stack.push_async_callback(_cancel, self.committer)
            application.ready = True
            stack.callback(application.drain)
            self._stack = stack.pop_all()
        return self

    def _otlp_export(self, registry: CollectorRegistry, statistics: IngestStatistics) -> OtlpExport | None:
        if not (endpoint := self._config.otlp_endpoint):
            return None
        attributes = {
            "service.name": "foreshock-collector",
            "service.version": VERSION,
            "service.instance.id": address_of(socket.gethostname(), self.http_port),
        }
        try:
            return OtlpExport(endpoint, registry, statistics, self._clock, attributes)
        except ImportError as error:
            raise ConfigError(f"--otlp-endpoint needs pip install 'foreshock[otlp]': {error}") from error

    async def _open_http(self, stack: AsyncExitStack, application: WebApplication) -> None:
        # No request has a body that is read: what a client compresses must not grow here.
        runner = web.AppRunner(
            application.as_aiohttp(), access_log=None, shutdown_timeout=_DRAIN_SECONDS, auto_decompress=False
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        assert runner.server is not None
        connections = application.connections
        context = None if self._certificates is None else self._certificates.http_context()
        try:
            listening = await asyncio.get_running_loop().create_server(
                connections.factory(runner.server),
                self._config.host,
                self._config.http_port,
                ssl=context,
                ssl_handshake_timeout=None if context is None else BEGIN_SECONDS,
            )
        except OSError as error:
            where = f"--http-port {self._config.http_port} on --host {self._config.host}"
            raise ConfigError(f"{where} cannot be listened on: {error.strerror or error}") from error
        stack.callback(listening.close)
        stack.push_async_callback(_cancel, asyncio.create_task(connections.sweep()))
        self.http_port = listening.sockets[0].getsockname()[1]

    async def _open_grpc(self, stack: AsyncExitStack, telemetry: Telemetry) -> None:
        server: Any = make_server(telemetry)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        try:
            address = address_of(self._config.host, self._config.grpc_port)
            if self._certificates is None:
                self.grpc_port = server.add_insecure_port(address)
            else:
                self.grpc_port = server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            where = f"--grpc-port {self._config.grpc_port} on --host {self._config.host}"
            raise ConfigError(f"{where} cannot be listened on: is it in use?") from error
        await server.start()
        stack.push_async_callback(server.stop, _DRAIN_SECONDS)
        stack.callback(telemetry.drain)
        for service in _SERVICES:
            await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
        stack.push_async_callback(servicer.enter_graceful_shutdown)

    def _hosts(self) -> frozenset[str] | None:
        """Return the names under which a browser on this machine reaches it; None if any machine may read it anyway."""
        if not is_loopback(self._config.host):
            return None
        public = urllib.parse.urlsplit(self._config.public_url).hostname or ""
        return frozenset(("localhost", self._config.host, public.lower()))

    @property
    def url(self) -> str:
        """Address for people and Prometheus."""
        return f"{self._scheme}://{address_of(self._config.host, self.http_port)}"

    @property
    def _scheme(self) -> str:
        return "http" if self._certificates is None else "https"

    @property
    def public_url(self) -> str:
        """Address under which people on other machines reach it, as far as it is known."""
        return (
            self._config.public_url.rstrip("/")
            or f"{self._scheme}://{address_of(public_host(self._config.host), self.http_port)}"
        )

    @property
    def address(self) -> str:
        """Address for recorders."""
        return address_of(self._config.host, self.grpc_port)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not ready, no more commits from the clock, health NOT_SERVING, last commit and acknowledgements, closed.
        await self._stack.aclose()


async def serve(config: Config) -> None:
    """Run until SIGTERM or SIGINT. Where its database is damaged or gone, begin again with a new one."""
    allow_open_files()
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    stopping: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stopping, number.name)
    while not stopping.done():
        try:
            await _serve(config, stopping)
        except GoneError as error:
            logger.error("%(error)s; the collector begins again with a new one", {"error": str(error)})
        except sqlite3.DatabaseError as error:
            recovery.replace(Path(config.database), error)
    logger.info("collector stopped on %(signal)s", {"signal": stopping.result()})


def allow_open_files() -> None:
    """Allow this process as many open files as the system does: idle connections must not shut others out."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(config: Config, stopping: asyncio.Future[str]) -> None:
    async with Server(config) as server:
        if config.ready_file:
            try:
                draft = Path(config.ready_file + ".draft")
                draft.write_text(json.dumps({"grpc": server.address, "http": server.url}))
                draft.rename(config.ready_file)
            except OSError as error:
                raise ConfigError(f"--ready-file {config.ready_file} cannot be written: {error.strerror}") from error
        facts = {
            "version": VERSION,
            "recorders": address_of(public_host(config.host), server.grpc_port),
            "page": server.public_url,
            "database": config.database,
        }
        logger.info("collector %(version)s started: records to %(recorders)s, page at %(page)s", facts)
        # A collector that no longer commits must not look alive: end, loudly, and let the supervisor start another.
        await asyncio.wait((stopping, server.committer), return_when=asyncio.FIRST_COMPLETED)
        if server.committer.done():
            server.committer.result()


def _tokens(config: Config, clock: Callable[[], float]) -> Tokens | None:
    try:
        return Tokens(Path(config.tokens), clock) if config.tokens else None
    except TokensError as error:
        raise ConfigError(f"--{error}") from error


def _certificates(config: Config) -> Certificates | None:
    """Return the certificates whose files can be used. Raises `ConfigError`."""
    if not config.tls_certificate:
        return None
    certificates = Certificates(
        certificate=Path(config.tls_certificate),
        key=Path(config.tls_key),
        client_ca=Path(config.tls_client_ca) if config.tls_client_ca else None,
    )
    try:
        certificates.grpc_credentials()
    except OSError as error:
        raise ConfigError(f"--tls-certificate, --tls-key or --tls-client-ca cannot be used: {error}") from error
    return certificates


def _never() -> float:
    return 0.0


def _stop(stopping: asyncio.Future[str], signal_name: str) -> None:
    if not stopping.done():
        stopping.set_result(signal_name)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))
