"""Debian's Chromium, headless, and a collector to look at."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from foreshock_collector.config import Config
from foreshock_collector.server import Server

DEADLINE = 30.0
_WATCH = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push(entry.duration);
}).observe({ type: "longtask", buffered: true });
"""


@contextmanager
def collector(folder: Path, *, http_port: int = 0) -> Iterator[tuple[str, str]]:
    """A server in a thread of its own, with the settings that users have; yields its URL and gRPC address."""
    folder.mkdir(exist_ok=True)
    started: list[Any] = []
    ready = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        async with Server(Config(grpc_port=0, http_port=http_port, database=str(folder / "db"))) as server:
            started.extend((server.url, server.address, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(DEADLINE), "the collector did not start"
    url, address, loop, stop = started
    try:
        yield url, address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE)
        assert not thread.is_alive(), "the collector did not stop"


class Browser:
    """A window of a browser with a fresh profile. Nothing but this machine can be reached from it."""

    def __init__(
        self, *, width: int = 1280, height: int = 900, dark: bool = False, beside: Browser | None = None
    ) -> None:
        """beside: another one, not yet closed, whose process and profile it shares; None: its own."""
        self._beside = beside
        if beside is None:
            self.driver = self._started()
        else:
            self.driver = beside.driver
            self.driver.switch_to.new_window("window")
        self.driver.set_window_size(width, height)
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        if width < 600:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _started(self) -> webdriver.Chrome:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert chromium and driver, (
            "the tests of the page need Chromium: apt-get install chromium chromium-driver, or make test"
        )
        self._profile = tempfile.mkdtemp(prefix="foreshock-chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            f"--user-data-dir={self._profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        return webdriver.Chrome(options=options, service=Service(driver))

    def open(self, url: str) -> None:
        self.driver.get(url)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return ({script})")

    def until(self, script: str, wanted: str) -> Any:
        """Ask until the answer is true; what it was."""
        # Not above: it takes a fourth of a second, in each worker that collects these tests.
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, DEADLINE, poll_frequency=0.05)
        return wait.until(lambda _: self.ask(script), f"never came: {wanted}; the page says {self.errors()}")

    def click(self, text: str) -> None:
        """Click the link or button with this text; found and clicked in one script, since the page may redraw it."""
        found = f"[...document.querySelectorAll('a, button')].find((each) => each.innerText === {json.dumps(text)})"
        self.until(f"(each => each && (each.click(), true))({found})", f"something to click: {text}")

    def text(self, selector: str) -> str:
        return str(self.ask(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def drawn(self, step: int) -> None:
        """Wait until all charts stand there, up to this step."""
        self.until(f"Number(document.body.dataset.drawn) >= {step}", f"charts up to step {step}")

    def errors(self) -> list[str]:
        """What the console has held that is an error or a warning, since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> list[str]:
        """Addresses that pages have asked for, since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        if self._beside is not None:
            self.driver.close()
            self.driver.switch_to.window(self.driver.window_handles[0])
            return
        self.driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)
