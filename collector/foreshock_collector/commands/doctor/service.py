"""Checks of a collector that runs: whether it answers, which version it is, and whom it notifies."""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.parse
from importlib.metadata import version as installed

from foreshock_collector.commands.client import authorization, fetch
from foreshock_collector.config import Config, ConfigError, address_of, is_loopback, public_host, secret_from
from foreshock_recorder.doctor.finding import Finding, fail, ok, warn

_SECONDS = 5.0
"""How long to wait for a connection."""
_BUILD = re.compile(r'^foreshock_build_info\{.*version="([^"]*)"', re.MULTILINE)


def url_of(config: Config) -> str:
    """Return FORESHOCK_URL, or the HTTP address that follows from a collector's settings."""
    scheme = "https" if config.tls_certificate else "http"
    address = address_of(public_host(config.host), config.http_port)
    return (os.environ.get("FORESHOCK_URL") or f"{scheme}://{address}").rstrip("/")


def page(config: Config) -> tuple[bool, Finding]:
    """Check that a collector answers by HTTP and can store. Return whether one answers, and the finding."""
    url = url_of(config)
    if not url.startswith(("http://", "https://")):
        return False, fail("page", f"{url} is not an HTTP address", "correct FORESHOCK_URL")
    try:
        fetch(f"{url}/-/ready", {})
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read(200).decode("utf-8", "replace").strip()
        return True, fail("page", f"{url} says: {answer or error}", "see the collector's log")
    except (OSError, ValueError) as error:
        advice = "start the collector, or run doctor with its environment and --config; with TLS, set FORESHOCK_CA_FILE"
        return False, fail("page", f"{url} does not answer: {error}", advice)
    return True, ok("page", f"{url} is ready{_only_here(config)}")


def records(config: Config) -> Finding:
    """Check that the port for recorders accepts connections."""
    host, port = public_host(config.host), config.grpc_port
    address = address_of(host, port)
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        return fail("records", f"{address} accepts no connections: {error}", "start the collector, or open the port")
    return ok("records", f"{address} accepts connections{_only_here(config)}")


def _only_here(config: Config) -> str:
    return ", from this machine only" if is_loopback(config.host) else ""


def version(config: Config) -> Finding:
    """Check that the collector that runs is the release that is installed."""
    here, url = installed("foreshock"), url_of(config)
    try:
        found = _BUILD.search(fetch(f"{url}/metrics", authorization()).decode())
    except (OSError, ValueError) as error:
        advice = "start the collector; if it asks for a token, set FORESHOCK_TOKEN_FILE to one that may read"
        return warn("running", f"version not compared: {error}", advice)
    if found is None:
        return fail("running", f"{url}/metrics is not a collector's", "set FORESHOCK_URL to the collector's address")
    if found[1] != here:
        return warn("running", f"the collector is {found[1]}, and {here} is installed here", "restart the collector")
    return ok("running", f"foreshock {found[1]}")


def notifications(config: Config) -> Finding:
    """Return whom the collector itself notifies. Sends nothing."""
    if not config.notify_url:
        return ok("notifications", "none by the collector itself")
    try:
        secret_from(config.notify_secret)
    except ConfigError as error:
        return fail("notifications", str(error), "correct it: the collector would not start")
    host = urllib.parse.urlsplit(config.notify_url).hostname
    return ok("notifications", f"go to {host}; foreshock notify --test sends one")
