"""Writes docs/screenshots: real runs of examples/train.py, a real collector, a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from foreshock_collector.commands.client import ask
from tests.support.browser import Browser, collector

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screenshots"
WIDE, NARROW = 1140, 390
LOOKS = {"light": (WIDE, False), "dark": (WIDE, True), "phone": (NARROW, False), "phone-dark": (NARROW, True)}
HEIGHT = {"fleet": 600, "run": 1300, "charts": 1230}
ON_A_PHONE = 844
MOST_BYTES = 200_000
DEADLINE_SECONDS = 120.0
EXPLODED, STEPS = "lr0.3", 190
RUNS = {
    # Name: learning rate, what is clipped, steps. Those of very many steps still run when the pictures are taken.
    "lr0.03": (0.03, "none", STEPS),
    EXPLODED: (0.3, "none", STEPS),
    "lr0.1-clip1": (0.1, "1.0", 10**6),
    "lr0.05": (0.05, "none", 10**6),
}


def main() -> None:
    """Each page in each look."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder)) as (url, address), ExitStack() as jobs:
        for run, (rate, clip, steps) in RUNS.items():
            jobs.enter_context(_training(run, rate, clip, steps, collector=address, rings=folder))
            _reached(url, run, STEPS)
        pages = {"fleet": "/", "run": f"/run/{EXPLODED}", "charts": f"/run/{EXPLODED}?first=100"}
        for look, (width, dark) in LOOKS.items():
            for page, path in pages.items():
                _shoot(page, look, url + path, width=width, dark=dark)


@contextmanager
def _training(run: str, rate: float, clip: str, steps: int, *, collector: str, rings: str) -> Iterator[None]:
    environment = {
        **os.environ,
        "FORESHOCK_COLLECTOR": collector,
        "FORESHOCK_EXPERIMENT": "example",
        "FORESHOCK_RUN": run,
        "FORESHOCK_CLIP": clip,
        "FORESHOCK_RING_DIR": rings,
    }
    script = [str(ROOT / "examples" / "train.py"), "--lr", str(rate), "--steps", str(steps), "--pace", "0.02"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    # torchrun tells at length that it was ended.
    with (Path(rings) / f"{run}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def _reached(url: str, run: str, steps: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = [each for each in ask(url, "runs")["runs"] if each["run"] == run]
        if found and found[0]["newest"].get("step", 0) >= steps - 1:
            return
        time.sleep(0.2)
    raise AssertionError(f"{run} has not come to step {steps}")


def _shoot(page: str, look: str, url: str, *, width: int, dark: bool) -> None:
    browser = Browser(width=width, height=ON_A_PHONE if width == NARROW else HEIGHT[page], dark=dark)
    try:
        browser.open(url)
        if page == "fleet":
            browser.until(f"document.querySelectorAll('tr[data-run]').length === {len(RUNS)}", "all runs")
        else:
            browser.drawn(STEPS)
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
