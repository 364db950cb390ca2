"""Takes docs/screenshots: real runs of the demo and of examples/train.py, a real collector, a real browser."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from foreshock_collector.commands.client import ask
from foreshock_collector.commands.demo.command import EXPLODES
from foreshock_collector.commands.demo.training import training
from tests.support.browser import Browser, collector

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screenshots"
WIDE, NARROW = 1140, 390
LOOKS = {"light": (WIDE, False), "dark": (WIDE, True), "phone": (NARROW, False), "phone-dark": (NARROW, True)}
HEIGHT = {"fleet": 600, "run": 1300, "charts": 1230, "demo": 1140}
ON_A_PHONE = 844
MOST_BYTES = 200_000
DEADLINE_SECONDS = 120.0
DEMO = "explodes"
EXPLODED, STEPS = "lr0.3", 190
RUNS = {
    # Name: learning rate, clipping, steps. Runs with very many steps are still active when the pictures are taken.
    "lr0.03": (0.03, "none", STEPS),
    EXPLODED: (0.3, "none", STEPS),
    "lr0.1-clip1": (0.1, "1.0", 10**6),
    "lr0.05": (0.05, "none", 10**6),
}


def main() -> None:
    """Take a picture of the demo's first run, and of each page in each look."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder)) as (url, address):
        asyncio.run(_demo(address, Path(folder)))
        steps = _ended(url, DEMO)
        _shoot("demo", "light", f"{url}/run/{DEMO}", width=WIDE, dark=False, steps=steps)
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder)) as (url, address), ExitStack() as jobs:
        for run, (rate, clip, steps) in RUNS.items():
            jobs.enter_context(_training(run, rate, clip, steps, collector=address, rings=folder))
            _reached(url, run, STEPS)
        pages = {"fleet": "/", "run": f"/run/{EXPLODED}", "charts": f"/run/{EXPLODED}?first=100"}
        for look, (width, dark) in LOOKS.items():
            for page, path in pages.items():
                _shoot(page, look, url + path, width=width, dark=dark)


async def _demo(address: str, folder: Path) -> None:
    """Run the training job of the demo's first act to its end."""
    async with training(DEMO, collector=address, folder=folder, options=[*EXPLODES]) as ended:
        await ended


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
    # torchrun reports its own termination at length.
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
    raise AssertionError(f"{run} has not reached step {steps}")


def _ended(url: str, run: str) -> int:
    """Wait until the collector knows that a run has ended, and return its number of steps."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = ask(url, "runs", run)
        if found["attempts"][-1]["over"]:
            return int(found["counters"]["steps"])
        time.sleep(0.2)
    raise AssertionError(f"{run} has not ended")


def _shoot(page: str, look: str, url: str, *, width: int, dark: bool, steps: int = STEPS) -> None:
    browser = Browser(width=width, height=ON_A_PHONE if width == NARROW else HEIGHT[page], dark=dark)
    try:
        browser.open(url)
        if page == "fleet":
            browser.until(f"document.querySelectorAll('tr[data-run]').length === {len(RUNS)}", "all runs")
        else:
            browser.drawn(steps)
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
