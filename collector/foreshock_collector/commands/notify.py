"""`foreshock notify --test`: one test notification, on the way that real ones take."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from foreshock_collector.config import ConfigError, Parser, config_from, is_web_address, secret_from
from foreshock_collector.notify.message import FORMATS, alertmanager_alerts, body_of
from foreshock_collector.notify.run_alerts import Notification
from foreshock_collector.notify.webhook import Answer, webhook
from foreshock_protos import DEFAULT_HTTP_PORT

_FIRING_SECONDS = 60.0
"""After that, Alertmanager considers the test resolved."""


def main(arguments: list[str]) -> int:
    """Send the test. Return 1 if it was not accepted, 2 if an option is invalid."""
    parser = Parser(
        prog="foreshock notify",
        description="Send one test notification, and print what the receiver answered.",
        epilog="By default it goes where the collector's settings send notifications. "
        "Exit code 1: it was not accepted. 2: an invalid option, or no address.",
    )
    parser.add_argument("--test", action="store_true", required=True, help="send a notification marked as a test")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="webhook to send it to (default: the collector's notify_url)")
    where.add_argument("--alertmanager", metavar="URL", help="send it to this Alertmanager, as Prometheus would")
    parser.add_argument(
        "--format", choices=FORMATS, help="form of the message (default: the collector's notify_format)"
    )
    parser.add_argument(
        "--secret", metavar="FILE", help="secret that signs it (default: the collector's notify_secret)"
    )
    parser.add_argument("--config", metavar="FILE", help="the collector's file of settings")
    try:
        options = parser.parse_args(arguments)
        config = config_from(["--config", options.config] if options.config else [])
        url = options.alertmanager or options.url or config.notify_url
        if not url:
            raise ConfigError("no address: give --url or --alertmanager, or set FORESHOCK_COLLECTOR_NOTIFY_URL")
        if not is_web_address(url):
            raise ConfigError("the address must begin with http:// or https://")
        secret = None if options.alertmanager else secret_from(options.secret or config.notify_secret)
    except ConfigError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    page = config.public_url.rstrip("/") or f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"
    now = time.time()
    if options.alertmanager:
        url = f"{url.rstrip('/')}/api/v2/alerts"
        content = alertmanager_alerts([_test(page, now, ends=now + _FIRING_SECONDS)])
        body = json.dumps(content).encode()
    else:
        body = body_of([_test(page, now)], form=options.format or config.notify_format, url=page)
    answer, host = asyncio.run(_post(url, secret, body, now))
    result = "accepted" if answer.accepted else "not accepted"
    sys.stdout.write(f"test notification {result} by {host}: {answer}\n")
    if answer.accepted and options.alertmanager:
        sys.stdout.write("Alertmanager notifies the receiver of critical alerts; look for it there.\n")
    return 0 if answer.accepted else 1


async def _post(url: str, secret: bytes | None, body: bytes, now: float) -> tuple[Answer, str]:
    async with webhook(url, secret) as client:
        return await client.post(body, now), client.host


def _test(page: str, now: float, ends: float | None = None) -> Notification:
    return Notification(
        labels={"alertname": "TestNotification", "experiment": "test", "run": "test", "severity": "critical"},
        annotations={
            "summary": "This is a test of Foreshock's notifications; no run is in trouble.",
            "description": "If you can read this, a real notification reaches you too.",
            "run": "test",
            "runbook_url": f"{page}/runbooks",
            "page_url": f"{page}/",
        },
        started_seconds=now,
        resolved_seconds=ends,
    )
