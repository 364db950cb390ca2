"""What the recorder shows a collector, and what it asks it to show: a token and certificates, in files.

The files are read for each stream, so that new ones need no restart.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc

TOKEN_FILE, CA_FILE = "FORESHOCK_TOKEN_FILE", "FORESHOCK_CA_FILE"
CERTIFICATE_FILE, KEY_FILE = "FORESHOCK_CERTIFICATE_FILE", "FORESHOCK_KEY_FILE"


class CredentialsError(Exception):
    """A file cannot be read; the text names it and its variable."""


def open_channel(address: str, options: Any) -> Any:
    """Return a channel to host:port, with TLS where FORESHOCK_CA_FILE is set. Raises `CredentialsError`."""
    ca = _read(CA_FILE)
    if ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(ca, _read(KEY_FILE), _read(CERTIFICATE_FILE))
    return grpc.aio.secure_channel(address, credentials, options=options)


def token_metadata() -> tuple[tuple[str, str], ...]:
    """Return the token of FORESHOCK_TOKEN_FILE as metadata; nothing without one. Raises `CredentialsError`."""
    token = _read(TOKEN_FILE)
    return () if token is None else (("authorization", f"Bearer {token.decode().strip()}"),)


def _read(variable: str) -> bytes | None:
    path = os.environ.get(variable, "")
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise CredentialsError(f"{variable}: {path} cannot be read: {error.strerror}") from error
