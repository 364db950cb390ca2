"""Queries a collector's API on behalf of the commands."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreshock_collector.config import Parser
from foreshock_protos import DEFAULT_HTTP_PORT

_SECONDS = 10.0


class ClientError(ValueError):
    """The collector did not answer, or answered with an error; the message says why."""


def add_url(parser: Parser) -> None:
    """Add the option for the collector's address, which defaults to `FORESHOCK_URL`."""
    default = os.environ.get("FORESHOCK_URL") or f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"
    parser.add_argument("--url", default=default, help="the collector's HTTP address (default: %(default)s)")


def ask(url: str, *path: str, **query: Any) -> dict[str, Any]:
    """GET /api/v1/..., with each path segment quoted. Raises `ClientError`."""
    address = "/".join((url.rstrip("/"), "api/v1", *(urllib.parse.quote(part, safe="") for part in path)))
    if not url.startswith(("http://", "https://")):
        raise ClientError(f"{url!r} is not the address of a collector; it begins with http:// or https://")
    if query:
        address += "?" + urllib.parse.urlencode(query)
    try:
        answer: dict[str, Any] = json.loads(fetch(address, authorization()))
    except urllib.error.HTTPError as error:
        raise ClientError(_reason(error)) from error
    except (OSError, ValueError) as error:
        raise ClientError(f"no collector at {url}: {error}") from error
    return answer


def fetch(address: str, headers: Mapping[str, str]) -> bytes:
    """GET an HTTP address. Raises `OSError` and `ValueError`.

    Ignores `http_proxy` unless FORESHOCK_HTTP_PROXY=1, as recorders do: a collector is usually on the same network.
    """
    # None means the proxies from the environment.
    proxies: dict[str, str] | None = None if os.environ.get("FORESHOCK_HTTP_PROXY") == "1" else {}
    context = ssl.create_default_context(cafile=os.environ.get("FORESHOCK_CA_FILE") or None)
    handlers = (urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context), _Redirects())
    request = urllib.request.Request(address, headers=dict(headers))  # noqa: S310 - callers check the scheme
    with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS) as response:
        body: bytes = response.read()
    return body


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and shows the token to no other server than the one that it is for."""

    def redirect_request(self, req: urllib.request.Request, *answer: Any) -> urllib.request.Request | None:
        request = super().redirect_request(req, *answer)
        if request is not None and (request.type, request.host) != (req.type, req.host):
            request.remove_header("Authorization")
        return request


def authorization() -> dict[str, str]:
    """Return the header with the token of FORESHOCK_TOKEN_FILE; nothing without one. Raises `OSError`."""
    path = os.environ.get("FORESHOCK_TOKEN_FILE")
    return {"Authorization": f"Bearer {Path(path).read_text().strip()}"} if path else {}


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the collector's error message, or the HTTP status if something else answered."""
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: {error.code} {error.reason}"
