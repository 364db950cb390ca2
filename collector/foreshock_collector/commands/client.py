"""Asks a collector's API, for commands."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from foreshock_collector.config import Parser
from foreshock_protos import DEFAULT_HTTP_PORT

_SECONDS = 10.0


class ClientError(ValueError):
    """No answer, or not the one that was asked for; the text says why."""


def add_url(parser: Parser) -> None:
    """The flag that says which collector, and its environment twin."""
    default = os.environ.get("FORESHOCK_URL") or f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"
    parser.add_argument("--url", default=default, help="the collector's HTTP address (default: %(default)s)")


def ask(url: str, *path: str, **query: Any) -> dict[str, Any]:
    """GET /api/v1/..., each part quoted. Raises `ClientError`.

    A collector is a neighbor: `http_proxy` is not obeyed unless FORESHOCK_HTTP_PROXY=1 says so, as for recorders.
    """
    address = "/".join((url.rstrip("/"), "api/v1", *(urllib.parse.quote(part, safe="") for part in path)))
    if query:
        address += "?" + urllib.parse.urlencode(query)
    # With None it takes those of the environment.
    proxies: dict[str, str] | None = None if os.environ.get("FORESHOCK_HTTP_PROXY") == "1" else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        with opener.open(address, timeout=_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise ClientError(_reason(error)) from error
    except (OSError, ValueError) as error:
        raise ClientError(f"no collector at {url}: {error}") from error
    return answer


def _reason(error: urllib.error.HTTPError) -> str:
    """In the collector's own words, if it was one that answered."""
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: {error.code} {error.reason}"
