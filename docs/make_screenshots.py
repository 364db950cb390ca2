"""Writes docs/screenshots: a real collector, a real stream of made-up numbers, a real browser."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.page.browser import Browser, collector
from tests.page.job import Job

FOLDER = Path(__file__).parent / "screenshots"
WIDE, NARROW = 1140, 390
LOOKS = {"light": (WIDE, False), "dark": (WIDE, True), "phone": (NARROW, False), "phone-dark": (NARROW, True)}
HEIGHT = {"fleet": 600, "run": 1400, "charts": 1230}
ON_A_PHONE = 844
MOST_BYTES = 200_000


def main() -> None:
    """Each page in each look."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder)) as (url, address):
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
        for _ in range(12):
            jobs[1].train(1, nan=True)
        for job in jobs:
            job.stored()
        jobs[3].finish()
        pages = {"fleet": "/", "run": f"/run/{jobs[1].run}", "charts": f"/run/{jobs[1].run}?first=290"}
        for look, (width, dark) in LOOKS.items():
            for page, path in pages.items():
                _shoot(page, look, url + path, width=width, dark=dark)
        for job in jobs:
            job.leave()


def _shoot(page: str, look: str, url: str, *, width: int, dark: bool) -> None:
    browser = Browser(width=width, height=ON_A_PHONE if width == NARROW else HEIGHT[page], dark=dark)
    try:
        browser.open(url)
        if page == "fleet":
            browser.until("document.querySelectorAll('tr[data-run]').length === 4", "four runs")
        else:
            browser.drawn(342)
        if page == "charts":
            browser.ask("document.querySelector('#charts').scrollIntoView({behavior: 'instant'})")
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
