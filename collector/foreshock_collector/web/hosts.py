"""Which names a request may call the collector by: a page of another site must not read a collector on localhost."""

from __future__ import annotations

import ipaddress
from typing import Any

from aiohttp import web


def is_address(host: str) -> bool:
    """Return whether a host is an IP address: no name server can change where that leads."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def host_of(header: str) -> str:
    """Return the host in a Host header, without its port and brackets."""
    host = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    return host.lower().rstrip(".")


def only_hosts(allowed: frozenset[str]) -> Any:
    """Return a middleware that refuses requests for other names: DNS rebinding makes a browser send them."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        host = host_of(request.headers.get("Host", ""))
        if host and host not in allowed and not is_address(host):
            raise web.HTTPForbidden(text="this collector has another name: to allow this one, set --public-url\n")
        response: web.StreamResponse = await handler(request)
        return response

    return check
