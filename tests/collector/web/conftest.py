"""A collector, jobs that tell it things, and a browser that looks; no test may leave an error in the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.browser import Browser, collector
from tests.support.streamed_job import Job


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The collector's URL, and its address for recorders."""
    with collector(tmp_path) as found:
        yield found


@pytest.fixture
def url(places: tuple[str, str]) -> str:
    return places[0]


@pytest.fixture
def job(places: tuple[str, str]) -> Iterator[Callable[..., Job]]:
    """Start a job: job(run, ranks=4, ...)."""
    started: list[Job] = []

    def start(run: str, **options: Any) -> Job:
        started.append(Job(places[1], run, **options))
        return started[-1]

    yield start
    for each in started:
        each.leave()


@pytest.fixture(scope="module")
def first_browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def open_browser(url: str, first_browser: Browser) -> Iterator[Callable[..., Browser]]:
    """Open a window of one browser: open_browser(width=390, dark=True)."""
    opened: list[Browser] = []

    def start(**options: Any) -> Browser:
        opened.append(Browser(beside=first_browser, **options))
        return opened[-1]

    yield start
    try:
        for browser in opened:
            assert browser.errors() == []
            # (the browser's own first page asks for chrome:// addresses)
            asked = [address for address in browser.requested() if address.startswith(("http", "ws"))]
            strangers = [address for address in asked if urlsplit(address).hostname != "127.0.0.1"]
            assert strangers == [], "a page has asked another host"
    finally:
        for browser in opened:
            browser.close()


@pytest.fixture
def browser(open_browser: Callable[..., Browser]) -> Browser:
    return open_browser()
