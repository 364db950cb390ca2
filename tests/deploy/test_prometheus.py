"""From a scrape to a person: the shipped Prometheus and Alertmanager configurations, with shorter intervals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.alerting import (
    Start,
    Webhook,
    faster,
    http_server,
    name_and_run,
    start_alertmanager,
    start_prometheus,
    with_receiver,
)

pytestmark = pytest.mark.integration


class Collector:
    """Serves the expositions that the test sets: the next one at each scrape, the last one for good."""

    def __init__(self) -> None:
        self.address = ""
        self._texts: deque[str] = deque([""])

    def show(self, *expositions: list[str]) -> None:
        build = 'foreshock_build_info{version="1",python="3.11"} 1'
        self._texts.extend("\n".join((build, *lines, "")) for lines in expositions)

    def scrape(self) -> str:
        return self._texts.popleft() if len(self._texts) > 1 else self._texts[0]


@pytest.fixture
def collector() -> Iterator[Collector]:
    served = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(served.scrape().encode())

        def log_message(self, *_: object) -> None: ...

    with http_server(Handler) as address:
        served.address = address
        yield served


def test_an_explosion_one_scrape_after_its_build_up_is_the_one_thing_told_of_that_run(
    collector: Collector, webhook: Webhook, start: Start, tmp_path: Path
) -> None:
    doomed, other = 'experiment="e",run="doomed"', 'experiment="e",run="other"'
    about = 'incident="1",alert="ForeshockExplodingGradients",verdict="exploding_gradients",summary="It exploded."'
    incident = f'{about},first_step="812",lead_steps="6",rank="3",layer="blocks.2"'
    now = time.time()
    build_up = f"foreshock_last_build_up_timestamp_seconds{{{doomed}}} {now}"
    collector.show(
        [f"foreshock_last_build_up_timestamp_seconds{{{doomed}}} 0"],
        [build_up],
        [
            build_up,
            f'foreshock_last_incident_timestamp_seconds{{{doomed},verdict="exploding_gradients"}} {now}',
            f"foreshock_incident_info{{{doomed},{incident}}} 1",
            f"foreshock_last_build_up_timestamp_seconds{{{other}}} {now}",
        ],
    )
    alertmanager = start_alertmanager(start, with_receiver(webhook.url, tmp_path, faster=2), tmp_path)
    start_prometheus(start, faster(tmp_path, collector.address, alertmanager), tmp_path)

    told = webhook.next()
    assert name_and_run(told) == ("firing", "ForeshockExplodingGradients", "doomed")
    assert "First non-finite step 812, 6 steps after the first sign." in told["annotations"]["description"]
    assert "Worst rank 3, layer blocks.2." in told["annotations"]["description"]
    # The other run's build-up began later and waits as long, so the doomed one's would be here before it.
    assert name_and_run(webhook.next()) == ("firing", "ForeshockGradientBuildUp", "other")
