"""Runs beside each other on one collector: none hides another, or takes it along."""

from __future__ import annotations

import threading
from collections import Counter
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.support.alerted_collector import Watch
from tests.support.collector_process import left
from tests.support.launched_jobs import Job, said
from tests.support.streamed_job import Job as ToldJob
from tests.support.waiting import eventually

STARTS, SCRAPES = 20, 1000
PAUSE_SECONDS = 0.01


class Scraping(threading.Thread):
    """Scrapes /metrics again and again; what the answers were."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._over = threading.Event()
        self.answers: Counter[int] = Counter()

    def run(self) -> None:
        while not self._over.wait(PAUSE_SECONDS):
            try:
                with urlopen(f"{self._url}/metrics", timeout=60) as response:
                    response.read()
                    self.answers[response.status] += 1
            except HTTPError as error:
                self.answers[error.code] += 1

    def stop(self) -> None:
        self._over.set()
        self.join()


def sampled(watch: Watch, series: str) -> list[float]:
    """Times of the samples above 0 that Prometheus has of one series, oldest first."""
    (found,) = watch.query(f"{series}[10m]")
    return [when for when, value in found["values"] if float(value) > 0]


def test_zero_losses_a_nan_and_a_healthy_run_at_once_are_each_told_of_as_what_they_are(watch: Watch, job: Job) -> None:
    address = watch.collector.address
    scraping = Scraping(watch.collector.url)
    scraping.start()
    try:
        healthy = job("steady", address, ranks=1, steps=10**6, pace=0.05)
        eventually(lambda: watch.query('foreshock_steps_total{run="steady"} > 10'), "its first steps, scraped")
        zero = job("zero", address, ranks=1, steps=120, zero_loss=True, pace=0.02)
        broken = job("broken", address, steps=60, nan_at=40, nan_rank=1, pace=0.02)
        for process in (zero, broken):
            said(process)
        for start in range(STARTS):
            starting = ToldJob(address, f"start-{start}", ranks=2)
            starting.train(3)
            starting.stored()
            starting.finish()
        left(watch.collector, "zero")
        (page,) = eventually(lambda: watch.told("broken"), "the page")
        eventually(lambda: watch.scraped("zero", 120), "a scrape after its end")
        eventually(lambda: scraping.answers.total() >= SCRAPES, "a thousand scrapes")
        samples = sampled(watch, 'foreshock_steps_total{run="steady"}')
        scrapes = [when for when in sampled(watch, "up") if samples[0] <= when <= samples[-1]]
    finally:
        scraping.stop()
        healthy.terminate()
    said(healthy)
    assert scraping.answers.keys() == {200}
    assert samples == scrapes, "a healthy run's series has no hole"
    assert page["labels"]["alertname"] == "ForeshockSuddenNonFinite"
    assert [run for run in ("zero", "steady") if watch.told(run)] == []
    assert watch.collector.run("zero")["incidents"] == []
