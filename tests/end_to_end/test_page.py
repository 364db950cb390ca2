"""A person opens the page while real ranks train, and watches them explode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import Browser
from tests.support.collector_process import Collector
from tests.support.launched_jobs import Job


@pytest.fixture
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


def test_a_run_that_explodes_is_seen_to_explode(collector: Collector, job: Job, browser: Browser) -> None:
    browser.open(collector.url)
    browser.until("document.querySelector('h1').innerText.startsWith('No run')", "an empty fleet")
    training = job("watched", collector.address, steps=300, pace=0.02, explode_at=200)
    browser.until("document.querySelector('tr[data-run=watched] td[data-label=step]')?.innerText > 50", "the run")
    browser.click("watched")
    browser.until("document.querySelector('article.incident')", "the incident")
    verdict = collector.run("watched")["incidents"][0]["verdict"]
    card = browser.text("article.incident")
    assert "Exploding gradients" in card
    assert f"step {verdict['first_bad_step']}" in card
    assert f"step {verdict['onset_step']}" in card
    assert all(line in card for line in verdict["try"])
    browser.drawn(verdict["first_bad_step"])
    rows = "document.querySelector('[data-chart=ranks] .js-plotly-plot').data[0].z.length"
    assert browser.ask(rows) == 2
    browser.click("Show these steps")
    browser.until("location.search.includes('first=')", "the steps around it")
    assert training.communicate(timeout=60)[0].count("done") == 2
    browser.until("document.querySelector('.condition').dataset.condition === 'failed'", "the end of the run")
    assert browser.errors() == []
