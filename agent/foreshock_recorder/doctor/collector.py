"""Checks of the collector from this machine: whether it answers, takes this token, and has the same time."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import grpc

from foreshock_protos import DEFAULT_HTTP_PORT
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub
from foreshock_recorder.credentials import CredentialsError, open_channel, token_metadata
from foreshock_recorder.doctor.finding import Finding, fail, ok, warn

_SECONDS = 5.0
"""How long to wait for an answer."""
_APART_SECONDS = 5.0
"""Difference of clocks that confuses a reader of times; steps are ordered by number."""


async def answers(address: str) -> Finding:
    """Check that a collector takes a stream from this machine. address: host:port of its gRPC service."""
    proxied = int(os.environ.get("FORESHOCK_HTTP_PROXY") == "1")
    try:
        channel = open_channel(address, (("grpc.enable_http_proxy", proxied),))
        metadata = token_metadata()
    except CredentialsError as error:
        return fail("collector", str(error), "correct the variable, or the rights of the file")
    async with channel:
        call = TelemetryStub(channel).Stream(iter(()), metadata=metadata)  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(_SECONDS):
                async for _ in call:
                    pass
        except TimeoutError:
            return unanswered(address, f"no answer for {_SECONDS:g} s")
        except grpc.aio.AioRpcError as error:
            return refused(address, error.code(), error.details() or error.code().name)
    return ok("collector", f"{address} takes records")


def refused(address: str, code: grpc.StatusCode, why: str) -> Finding:
    """Return the finding for a stream that ended with an error."""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        advice = "set FORESHOCK_TOKEN_FILE to a file with a token that may write"
        return fail("collector", f"{address} refuses this machine: {why}", advice)
    return unanswered(address, why)


def unanswered(address: str, why: str) -> Finding:
    """Return the finding for a collector that does not answer."""
    advice = "start it, open the port, or set FORESHOCK_COLLECTOR; with TLS, set FORESHOCK_CA_FILE"
    return fail("collector", f"{address} does not answer: {why}", advice)


def http_address(address: str, environment: Mapping[str, str]) -> str:
    """Return FORESHOCK_URL, or the HTTP address of the collector at host:port if that has the default port."""
    scheme = "https" if environment.get("FORESHOCK_CA_FILE") else "http"
    return environment.get("FORESHOCK_URL") or f"{scheme}://{address.rpartition(':')[0]}:{DEFAULT_HTTP_PORT}"


def clock(url: str) -> Finding:
    """Compare this machine's clock with that of the collector. url: its HTTP address."""
    # None means the proxies from the environment.
    proxies: dict[str, str] | None = None if os.environ.get("FORESHOCK_HTTP_PROXY") == "1" else {}
    unknown = "set FORESHOCK_URL to the collector's HTTP address"
    if not url.startswith(("http://", "https://")):
        return warn("clock", f"not compared: {url} is no HTTP address", unknown)
    try:
        context = ssl.create_default_context(cafile=os.environ.get("FORESHOCK_CA_FILE") or None)
        handlers = (urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context))
        opener = urllib.request.build_opener(*handlers)
        with opener.open(f"{url.rstrip('/')}/-/healthy", timeout=_SECONDS) as response:
            date = parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (OSError, ValueError, TypeError) as error:
        return warn("clock", f"not compared: {url} does not answer ({error})", unknown)
    # The header has whole seconds, rounded down.
    return apart(time.time() - date - 0.5)


def apart(seconds: float) -> Finding:
    """Return the finding for clocks that differ by so much."""
    if abs(seconds) > _APART_SECONDS:
        ahead = "ahead of" if seconds > 0 else "behind"
        text = f"{abs(seconds):,.0f} s {ahead} the collector's"
        return warn("clock", text, "synchronize both, for example with chrony: times on the page are off by as much")
    return ok("clock", "as the collector's")
