"""Certificates of the collector, for gRPC and HTTP, read again when their files change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from foreshock_collector.access.watched_file import WatchedFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """Names the files, in PEM."""

    certificate: Path
    """The collector's certificate, followed by those that signed it."""
    key: Path
    """Its private key."""
    client_ca: Path | None
    """Certificates that sign those of recorders: each must show one. None: recorders need none."""

    def http_context(self) -> ssl.SSLContext:
        """Return a context for HTTP. Raises `OSError`, which `ssl.SSLError` is, for files that cannot be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        files = WatchedFiles(self.certificate, self.key)

        def read_again(*_: Any) -> None:
            if files.changed():
                try:
                    context.load_cert_chain(self.certificate, self.key)
                except OSError as error:
                    logger.error(
                        "certificate %(path)s: %(error)s", {"path": str(self.certificate), "error": str(error)}
                    )

        # Called for each connection; what is read holds from the next one on.
        context.sni_callback = read_again
        return context

    def grpc_credentials(self) -> Any:
        """Return credentials for gRPC. Raises `OSError` for files that cannot be used."""
        # gRPC reports nothing about a wrong file until a recorder connects.
        self.http_context()
        watched = [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]
        files = WatchedFiles(*watched)

        def current() -> Any:
            ca = self.client_ca.read_bytes() if self.client_ca else None
            pair = (self.key.read_bytes(), self.certificate.read_bytes())
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

        def changed() -> Any:
            try:
                return current() if files.changed() else None
            except OSError as error:
                logger.error("certificate %(path)s: %(error)s", {"path": str(self.certificate), "error": str(error)})
                return None

        return grpc.dynamic_ssl_server_credentials(
            current(), changed, require_client_authentication=self.client_ca is not None
        )
