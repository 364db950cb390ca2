"""Check of the collector from this machine: whether it answers and accepts this token. Needs gRPC."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import grpc

from foreshock_protos.text import escaped
from foreshock_protos.v1.telemetry_pb2_grpc import TelemetryStub
from foreshock_recorder.credentials import CredentialsError, open_channel, token_metadata
from foreshock_recorder.doctor.finding import Finding, fail, ok

_SECONDS = 5.0
"""How long to wait for an answer."""


async def answers(address: str) -> Finding:
    """Check that a collector takes a stream from this machine. address: host:port of its gRPC service."""
    proxied = int(os.environ.get("FORESHOCK_HTTP_PROXY") == "1")
    try:
        channel = open_channel(address, (("grpc.enable_http_proxy", proxied),))
        metadata = token_metadata()
    except CredentialsError as error:
        return fail("collector", str(error), "correct the variable, or the rights of the file")
    async with channel:
        call = TelemetryStub(channel).Stream(metadata=metadata)  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(_SECONDS):
                # Where the stream has ended already, reading says why. With an iterator of requests instead, gRPC would
                # cancel the call then, and with it whoever reads.
                with suppress(Exception):
                    await call.done_writing()
                async for _ in call:
                    pass
        except TimeoutError:
            return unanswered(address, f"no answer for {_SECONDS:g} s")
        except grpc.aio.AioRpcError as error:
            return refused(address, error.code(), escaped(error.details() or error.code().name))
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
