"""The body of a notification, and its signature.

By default the body is what Alertmanager posts to a webhook, version 4:
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from foreshock_collector.notify.run_alerts import Notification

FORMATS = ("alertmanager", "slack", "teams")
SIGNATURE_HEADER = "Foreshock-Signature"
_NEVER = "0001-01-01T00:00:00Z"
"""Time at which Alertmanager says that an alert ended which still fires: Go's zero time."""


def body_of(notifications: Sequence[Notification], *, form: str, url: str) -> bytes:
    """Return the body of one message about one run, as JSON. form: of FORMATS; url: the collector's page."""
    if form == "alertmanager":
        return json.dumps(_alertmanager(notifications, url)).encode()
    return json.dumps((_slack if form == "slack" else _teams)(notifications)).encode()


def alertmanager_alerts(notifications: Sequence[Notification]) -> list[dict[str, Any]]:
    """Return the body with which Prometheus posts alerts to Alertmanager's /api/v2/alerts, before encoding."""
    keys = ("labels", "annotations", "startsAt", "endsAt", "generatorURL")
    return [{key: alert[key] for key in keys} for alert in map(_alert, notifications)]


def signature(secret: bytes, body: bytes, seconds: float) -> str:
    """Return the value of the header that proves the sender: HMAC-SHA256 over Unix time, a dot and the body."""
    time = f"{seconds:.0f}"
    digest = hmac.new(secret, time.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"t={time},v1={digest}"


def _alertmanager(notifications: Sequence[Notification], url: str) -> dict[str, Any]:
    alerts = [_alert(each) for each in notifications]
    group = {name: notifications[0].labels[name] for name in ("experiment", "run")}
    return {
        "version": "4",
        "groupKey": "{}:" + json.dumps(group),
        "truncatedAlerts": 0,
        "status": _status(notifications),
        "receiver": "foreshock",
        "groupLabels": group,
        "commonLabels": _common([each.labels for each in notifications]),
        "commonAnnotations": _common([each.annotations for each in notifications]),
        "externalURL": url,
        "alerts": alerts,
    }


def _alert(notification: Notification) -> dict[str, Any]:
    labels = json.dumps(notification.labels, sort_keys=True).encode()
    resolved = notification.resolved_seconds
    return {
        "status": "firing" if resolved is None else "resolved",
        "labels": notification.labels,
        "annotations": notification.annotations,
        "startsAt": _time(notification.started_seconds),
        "endsAt": _NEVER if resolved is None else _time(resolved),
        "generatorURL": notification.annotations["page_url"],
        "fingerprint": hashlib.sha256(labels).hexdigest()[:16],
    }


def _slack(notifications: Sequence[Notification]) -> dict[str, Any]:
    lines = []
    for each in notifications:
        text = f"{_title(each)}: {each.annotations['summary']} {each.annotations['description']}"
        # https://docs.slack.dev/messaging/formatting-message-text#escaping
        for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            text = text.replace(character, entity)
        lines += [text, f"<{each.annotations['page_url']}|page> <{each.annotations['runbook_url']}|runbook>"]
    return {"text": "\n".join(lines)}


def _teams(notifications: Sequence[Notification]) -> dict[str, Any]:
    """Return an Adaptive Card, as the trigger "When a Teams webhook request is received" of Workflows takes it.

    https://learn.microsoft.com/connectors/teams/#microsoft-teams-webhook
    """
    blocks: list[dict[str, Any]] = []
    links: list[dict[str, str]] = []
    for each in notifications:
        blocks.append({"type": "TextBlock", "text": _title(each), "weight": "Bolder", "wrap": True})
        text = f"{each.annotations['summary']} {each.annotations['description']}"
        # A text run, because a text block would read Markdown in a run's name.
        blocks.append({"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": text}]})
        links.append({"type": "Action.OpenUrl", "title": "Runbook", "url": each.annotations["runbook_url"]})
    links.append({"type": "Action.OpenUrl", "title": "Page", "url": notifications[0].annotations["page_url"]})
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.2",
        "body": blocks,
        "actions": links,
    }
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": card}
    return {"type": "message", "attachments": [attachment]}


def _title(notification: Notification) -> str:
    status = notification.labels["severity"].upper() if notification.resolved_seconds is None else "RESOLVED"
    return f"{status} {notification.labels['alertname']}"


def _status(notifications: Sequence[Notification]) -> str:
    return "firing" if any(each.resolved_seconds is None for each in notifications) else "resolved"


def _common(mappings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    first = mappings[0]
    return {key: value for key, value in first.items() if all(each.get(key) == value for each in mappings)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
