"""Prometheus, Alertmanager and a webhook around a collector: all that stands between a rank and a person."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.alerting import (
    Webhook,
    faster,
    listening,
    programs,
    request,
    start_alertmanager,
    start_prometheus,
    with_receiver,
)
from tests.support.collector_process import Collector
from tests.support.waiting import eventually
from tests.support.yaml_text import parsed


@dataclass(frozen=True)
class Watch:
    """All that stands between a rank and a person."""

    collector: Collector
    webhook: Webhook
    alertmanager: str
    prometheus: str
    heard: list[dict[str, Any]] = field(default_factory=list)
    """All that the webhook has been told, in the order of arrival."""

    def alerts(self, run: str) -> dict[str, str]:
        """What Alertmanager knows of a run: alert name to "active" or "suppressed"."""
        found = request(self.alertmanager, "GET", f"/api/v2/alerts?filter=run%3D{run}")
        return {alert["labels"]["alertname"]: alert["status"]["state"] for alert in found}

    def told(self, run: str) -> list[dict[str, Any]]:
        """What the webhook has heard of a run so far, resolved alerts left out."""
        while True:
            try:
                self.heard.append(self.webhook.alerts.get_nowait())
            except queue.Empty:
                return [a for a in self.heard if a["labels"].get("run") == run and a["status"] == "firing"]

    def scraped(self, run: str, steps: int) -> bool:
        """Prometheus has seen so many steps, and has judged its rules since."""
        query = f"/api/v1/query?query=foreshock_steps_total%7Brun%3D%22{run}%22%7D"
        result = request(self.prometheus, "GET", query)["data"]["result"]
        groups = request(self.prometheus, "GET", "/api/v1/rules")["data"]["groups"]
        if not result or float(result[0]["value"][1]) < steps:
            return False
        seen = time.time()
        eventually(lambda: self._judged() > seen, "an evaluation of the rules")
        return bool(groups)

    def query(self, query: str) -> list[dict[str, Any]]:
        """What Prometheus answers now."""
        result: list[dict[str, Any]] = request(self.prometheus, "GET", f"/api/v1/query?query={quote(query)}")["data"][
            "result"
        ]
        return result

    def _judged(self) -> float:
        groups = request(self.prometheus, "GET", "/api/v1/rules")["data"]["groups"]
        times = [parsed(group["lastEvaluation"]).timestamp() for group in groups]
        return float(min(times))


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    """For as long as the block lasts."""
    with ExitStack() as stack:
        collector = Collector(folder)
        stack.callback(collector.stop)
        webhook = stack.enter_context(listening())
        start = stack.enter_context(programs())
        # Evaluations are five times as fast as those shipped, the waits only twice: a climb of a second or two on a
        # busy machine still ends within them, as one of the shipped ten seconds does.
        alertmanager = start_alertmanager(start, with_receiver(webhook.url, folder, faster=2), folder)
        config = faster(folder, collector.url.removeprefix("http://"), alertmanager)
        prometheus = start_prometheus(start, config, folder)
        yield Watch(collector, webhook, alertmanager, prometheus)
