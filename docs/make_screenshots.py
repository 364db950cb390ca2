"""Writes docs/screenshots: a real collector, a real stream of made-up numbers, a real browser."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.page.browser import Browser, collector
from tests.page.job import Job

FOLDER = Path(__file__).parent / "screenshots"
LOOKS = {"light": (1280, False), "dark": (1280, True), "phone": (390, False), "phone-dark": (390, True)}
HEIGHT = {"fleet": {1280: 640, 390: 844}, "run": {1280: 1560, 390: 844}, "runbook": {1280: 900, 390: 844}}
MOST_BYTES = 300_000


def main() -> None:
    """Each page in each look."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder)) as places:
        url, address = places.split()
        jobs = [
            Job(address, "gpt-350m-lr3e-4", ranks=8, experiment="pretrain"),
            Job(address, "gpt-350m-lr6e-4", ranks=4, experiment="pretrain"),
            Job(address, "gpt-1b-warmup-2k", ranks=16, experiment="pretrain"),
            Job(address, "bert-base-seed-2", ranks=2, experiment="baseline"),
        ]
        for job, steps in zip(jobs, (640, 320, 1480, 900), strict=True):
            job.train(steps)
        jobs[1].train(9, explode=True)
        jobs[1].train(1, nan=True)
        jobs[1].train(12)
        for job in jobs:
            job.stored()
        jobs[3].finish()
        pages = {"fleet": "/", "run": f"/run/{jobs[1].run}", "runbook": "/runbooks/ForeshockExplodingGradients"}
        for look, (width, dark) in LOOKS.items():
            for page, path in pages.items():
                _shoot(page, look, url + path, width=width, dark=dark)
        for job in jobs:
            job.leave()


def _shoot(page: str, look: str, url: str, *, width: int, dark: bool) -> None:
    browser = Browser(width=width, height=HEIGHT[page][width], dark=dark)
    try:
        browser.open(url)
        if page == "run":
            browser.drawn(342)
        elif page == "fleet":
            browser.until("document.querySelectorAll('tr[data-run]').length === 4", "four runs")
        target = FOLDER / f"{page}-{look}.png"
        assert browser.driver.save_screenshot(str(target))
        size = target.stat().st_size
        assert size < MOST_BYTES, f"{target} has {size} bytes"
        sys.stdout.write(f"{target.name}  {size // 1000} kB\n")
        assert not (errors := browser.errors()), errors
    finally:
        browser.close()


if __name__ == "__main__":
    main()
