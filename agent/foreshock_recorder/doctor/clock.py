"""Check of this machine's clock against that of another, by HTTP: it needs no gRPC."""

from __future__ import annotations

import os
import ssl
import time
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from foreshock_protos import DEFAULT_HTTP_PORT
from foreshock_recorder.doctor.finding import Finding, ok, warn

_SECONDS = 5.0
"""How long to wait for an answer."""
_APART_SECONDS = 5.0
"""Difference of clocks that confuses a reader of times; steps are ordered by number."""
_UNKNOWN = "set FORESHOCK_URL to the collector's HTTP address"


def http_address(address: str, environment: Mapping[str, str]) -> str:
    """Return FORESHOCK_URL, or the HTTP address of the collector at host:port if that has the default port."""
    scheme = "https" if environment.get("FORESHOCK_CA_FILE") else "http"
    return environment.get("FORESHOCK_URL") or f"{scheme}://{address.rpartition(':')[0]}:{DEFAULT_HTTP_PORT}"


def clock(url: str, whose: str = "the collector's", unknown: str = _UNKNOWN) -> Finding:
    """Compare this machine's clock with another's. url: what answers there. unknown: advice if nothing does."""
    # None means the proxies from the environment.
    proxies: dict[str, str] | None = None if os.environ.get("FORESHOCK_HTTP_PROXY") == "1" else {}
    if not url.startswith(("http://", "https://")):
        return warn("clock", f"not compared: {url} is not an HTTP address", unknown)
    try:
        context = ssl.create_default_context(cafile=os.environ.get("FORESHOCK_CA_FILE") or None)
        handlers = (urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context))
        opener = urllib.request.build_opener(*handlers)
        asked = time.time()
        with opener.open(f"{url.rstrip('/')}/-/healthy", timeout=_SECONDS) as response:
            date = parsedate_to_datetime(response.headers["Date"]).timestamp()
        answered = time.time()
    except (OSError, ValueError, TypeError) as error:
        return warn("clock", f"not compared: {url} does not answer ({error})", unknown)
    # The header has whole seconds, rounded down. The middle: a slow answer does not set the clocks apart.
    return apart((asked + answered) / 2 - date - 0.5, whose)


def apart(seconds: float, whose: str) -> Finding:
    """Return the finding for clocks that differ by so much."""
    if abs(seconds) > _APART_SECONDS:
        ahead = "ahead of" if seconds > 0 else "behind"
        text = f"{abs(seconds):,.0f} s {ahead} {whose}"
        return warn("clock", text, "synchronize both, for example with chrony: times and alerts are off by as much")
    return ok("clock", f"same as {whose}")
