"""The address of a collector, as people write it."""

from __future__ import annotations

from foreshock_protos import DEFAULT_GRPC_PORT


def address_of(text: str) -> str:
    """Return host:port of a collector; for an empty text, this machine's. Raises `ValueError`."""
    host, _, port = text.rpartition(":")
    if text and not (host and "/" not in text and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is not host:port")
    return text or f"127.0.0.1:{DEFAULT_GRPC_PORT}"
