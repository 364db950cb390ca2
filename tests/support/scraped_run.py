"""Reads /metrics of a collector again and again, and notes when a run's alert conditions first hold there."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from tests.support.collector_process import Collector
from tests.support.waiting import eventually

BUILD_UP = "foreshock_last_build_up_timestamp_seconds"
INCIDENT = "foreshock_last_incident_timestamp_seconds"
"""What the alerts of a build-up and of a verdict read."""


class Scraped:
    """Scrapes from another thread while a job runs: `with Scraped(collector, run) as scraped`."""

    def __init__(self, collector: Collector, run: str) -> None:
        self._collector, self._run = collector, run
        self.first: dict[str, float] = {}
        """Time at which each series, with its verdict, was first seen above 0."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._scrape)

    def __enter__(self) -> Scraped:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def wait_for(self, *conditions: str) -> None:
        """Go on scraping until these have been seen: the API may know of them earlier."""
        eventually(lambda: self.first.keys() >= set(conditions), f"{conditions} on /metrics")

    def seconds_after(self, condition: str, step: int) -> float:
        """From the moment at which the ranks had made a step to that at which a condition was first scraped."""
        return self.first[condition] - self.made(step)

    def made(self, step: int) -> float:
        """Time at which the ranks had made a step."""
        steps: dict[str, Any] = self._collector.get(f"/api/v1/runs/{self._run}/steps")
        seconds: float = steps["wall_seconds"][steps["step"].index(step)]
        return seconds

    def _scrape(self) -> None:
        wanted = re.compile(rf'^({BUILD_UP}|{INCIDENT})\{{(.*run="{self._run}".*)\}} (\S+)$', re.MULTILINE)
        while not self._ended.wait(0.02):
            text, now = self._collector.metrics(), time.time()
            for name, labels, value in wanted.findall(text):
                verdict = re.search(r'verdict="(\w+)"', labels)
                if float(value) > 0:
                    self.first.setdefault(name if verdict is None else verdict[1], now)
