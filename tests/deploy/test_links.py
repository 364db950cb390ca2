"""From what a person is sent to what they then see: the links of a firing alert, followed."""

from __future__ import annotations

import html
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.alerting import Start, Webhook, faster, start_alertmanager, start_prometheus, with_receiver
from tests.support.browser import collector
from tests.support.streamed_job import Job

pytestmark = pytest.mark.integration

NAME = "night run/7 {<50%+>}"
"""Each of its marks means something else to a URL or to HTML."""


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The collector's URL, and its address for recorders."""
    with collector(tmp_path) as found:
        yield found


def read(url: str) -> tuple[int, str]:
    """As a browser asks."""
    asked = urllib.request.Request(url, headers={"Accept": "text/html"})
    try:
        with urllib.request.urlopen(asked, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def told(webhook: Webhook, name: str) -> dict[str, Any]:
    """The alert of this name: a build-up may be told of before the explosion that it leads to."""
    while (alert := webhook.next())["labels"]["alertname"] != name:
        assert alert["labels"]["alertname"] == "ForeshockGradientBuildUp"
    return alert


@pytest.mark.parametrize(
    ("name", "steps", "explode"), [("ForeshockExplodingGradients", 6, True), ("ForeshockSuddenNonFinite", 1, False)]
)
def test_the_links_of_an_alert_lead_to_the_run_step_and_verdict_that_it_names(
    name: str, steps: int, explode: bool, places: tuple[str, str], webhook: Webhook, start: Start, tmp_path: Path
) -> None:
    url, address = places
    alertmanager = start_alertmanager(start, with_receiver(webhook.url, tmp_path), tmp_path)
    start_prometheus(start, faster(tmp_path, urlsplit(url).netloc, alertmanager), tmp_path)
    job = Job(address, NAME)
    try:
        job.train(100)
        job.train(steps, explode=explode, nan=True)
        alert = told(webhook, name)
    finally:
        job.leave()

    said = alert["annotations"]
    assert (said["run"], alert["labels"]["run"]) == (NAME, NAME)

    status, page = read(said["page_url"])
    assert status == 200
    assert html.escape(NAME) in page
    status, _ = read(said["page_url"] + "0")
    assert status == 404, "any name has a page: then that there is one proves nothing"

    # The page asks for its data by the last part of its own address.
    status, data = read(f"{url}/api/v1/runs/{said['page_url'].rpartition('/')[2]}")
    assert status == 200
    run = json.loads(data)
    assert run["run"] == NAME
    (incident,) = run["incidents"]
    verdict = incident["verdict"]
    assert said["verdict"] == verdict["cause"] == run["verdict"]
    assert said["since_step"] == str(verdict["first_bad_step"])
    assert said["lead_steps"] == str(verdict["lead_steps"])
    assert said["worst_rank"] == ("unknown" if verdict["rank"] in (None, -1) else str(verdict["rank"]))
    assert said["layer"] == (verdict["layer"] or "unknown")

    status, runbook = read(said["runbook_url"])
    assert status == 200
    assert f"<h1>{name}</h1>" in runbook
