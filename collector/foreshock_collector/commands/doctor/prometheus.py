"""Checks of Prometheus: whether it scrapes the collector, has the shipped rules, and has an Alertmanager."""

from __future__ import annotations

import json
import socket
import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from foreshock_collector.alerting.alert import Alert
from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.commands.client import fetch
from foreshock_collector.config import Config, is_web_address, public_host
from foreshock_collector.notify.run_alerts import duration
from foreshock_recorder.doctor.clock import clock
from foreshock_recorder.doctor.finding import Finding, fail, ok, warn

_JOB = "foreshock"
"""Name of the job in the shipped prometheus.yml."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_RULES = "foreshock files prints where foreshock.rules.yml is; list it in rule_files and reload Prometheus"
_API = "/api/v2/alerts"
"""Ends the address of an Alertmanager, as Prometheus tells it."""
_SHOWN = 3
"""Alerts that are named; the others are counted."""


def prometheus(url: str, config: Config) -> Iterator[Finding]:
    """Yield the result of each check. url: address of Prometheus; empty if unknown."""
    if not url:
        advice = "--prometheus-url URL checks that it scrapes the collector, and its rules and Alertmanager"
        yield warn("prometheus", "not checked", advice)
        return
    if not is_web_address(url):
        yield fail("prometheus", f"{url} is not an HTTP address", "correct --prometheus-url")
        return
    try:
        targets = _ask(url, "targets?state=active")["activeTargets"]
        yield scraping(targets, hosts={public_host(config.host), socket.gethostname(), *_LOCAL}, port=config.http_port)
        yield rules([rule for group in _ask(url, "rules?type=alert")["groups"] for rule in group["rules"]])
        yield from alertmanagers(_ask(url, "alertmanagers")["activeAlertmanagers"], notifies=bool(config.notify_url))
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "start it, or correct --prometheus-url: the address of Prometheus itself, with its path prefix"
        yield fail("prometheus", f"{url} does not answer as Prometheus does: {error}", advice)
        return
    yield clock(url, "that of Prometheus", "check the address")


def _ask(url: str, path: str) -> Any:
    return json.loads(fetch(f"{url.rstrip('/')}/api/v1/{path}", {}))["data"]


def scraping(targets: Sequence[Mapping[str, Any]], *, hosts: Collection[str], port: int) -> Finding:
    """Check that a collector is among the targets. hosts: its names. Targets are those of Prometheus' API."""
    found = [each for each in targets if _address(each) in {(host, port) for host in hosts}]
    # Prometheus may reach it under a name that this machine does not know.
    found = found or [each for each in targets if each["labels"].get("job") == _JOB]
    if not found:
        advice = f"add the job {_JOB} of deploy/prometheus/prometheus.yml to scrape_configs"
        return fail("prometheus", f"none of its {len(targets)} targets is the collector", advice)
    for each in found:
        if each["health"] == "down":
            advice = "see that it can reach the address, and has a token that may read if the collector asks for one"
            return fail("prometheus", f"cannot scrape {each['scrapeUrl']}: {each['lastError']}", advice)
    one = found[0]
    if one["health"] != "up":
        return warn("prometheus", f"has not scraped {one['scrapeUrl']} yet", "run doctor again in a minute")
    return ok("prometheus", f"scrapes {one['scrapeUrl']} every {one.get('scrapeInterval', 'few seconds')}")


def _address(target: Mapping[str, Any]) -> tuple[str | None, int | None]:
    parts = urllib.parse.urlsplit(target["scrapeUrl"])
    return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def rules(loaded: Sequence[Mapping[str, Any]]) -> Finding:
    """Check that the rules of Prometheus' API are those of this release. Labels and links are the user's to change."""
    by_name = {rule["name"]: rule for rule in loaded}
    failing = [rule for rule in by_name.values() if rule["name"].startswith("Foreshock") and rule["health"] == "err"]
    missing = [alert.name for alert in ALERTS if alert.name not in by_name]
    changed = [alert.name for alert in ALERTS if alert.name in by_name and not is_same(alert, by_name[alert.name])]
    known = {alert.name for alert in ALERTS}
    unknown = [name for name in by_name if name.startswith("Foreshock") and name not in known]
    release = f"foreshock {version('foreshock')}"
    if len(missing) == len(ALERTS):
        return fail("rules", "not loaded", _RULES)
    if missing:
        return fail("rules", f"{_named(missing)} of {len(ALERTS)} not loaded", _RULES)
    if failing:
        return fail("rules", f"{failing[0]['name']} fails: {failing[0].get('lastError')}", "see the log of Prometheus")
    if changed or unknown:
        text = f"{_named(changed + unknown)} not as in {release}"
        return warn("rules", text, f"unless this is intended: {_RULES}")
    return ok("rules", f"{len(ALERTS)} alerts, as in {release}")


def is_same(alert: Alert, rule: Mapping[str, Any]) -> bool:
    """Return whether Prometheus' rule fires when the alert does. Prometheus writes expressions in its own layout."""
    firing = rule.get("keepFiringFor")
    return (
        "".join(rule["query"].split()) == "".join(alert.expr.split())
        and rule["duration"] == duration(alert.wait)
        and (firing is None or firing == duration(alert.keep_firing_for))
    )


def _named(names: Sequence[str]) -> str:
    others = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {others} more" if others > 0 else "")


def alertmanagers(active: Sequence[Mapping[str, Any]], *, notifies: bool) -> Iterator[Finding]:
    """Check the Alertmanagers that Prometheus knows. notifies: the collector notifies somebody itself."""
    if not active and notifies:
        yield ok("alertmanager", "none; the collector notifies")
    elif not active:
        advice = "add one to alerting in prometheus.yml, or start the collector with --notify-url"
        yield warn("alertmanager", "none: alerts are not sent", advice)
    for each in active:
        url = str(each["url"]).removesuffix(_API)
        try:
            fetch(f"{url}/-/ready", {})
        except (OSError, ValueError) as error:
            advice = "start it, unless only Prometheus reaches it"
            yield warn("alertmanager", f"{url} does not answer from here: {error}", advice)
        else:
            yield ok("alertmanager", f"{url} is ready; foreshock notify --test --alertmanager {url} sends a test")
