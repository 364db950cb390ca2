"""Runs Prometheus and Alertmanager with the shipped configuration, scraping every second, if both are on PATH."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.rule_file import rule_file
from foreshock_collector.commands.demo import DemoError
from foreshock_collector.commands.demo.training import end
from foreshock_collector.resources import resource

_ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")
"""Names of the program; the first is Debian's."""
_LISTENING = re.compile(rb'Listening on"? address="?(?:\[::\]|127\.0\.0\.1):(\d+)')
_START_SECONDS = 20.0
_END_SECONDS = 5.0


class Alerting:
    """Queries the alerts of an Alertmanager."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def alerts(self, run: str) -> list[dict[str, Any]]:
        """Return the alerts of a run, worst first, including inhibited ones."""
        async with self._session.get(f"{self.url}/api/v2/alerts", params={"filter": f'run="{run}"'}) as response:
            alerts: list[dict[str, Any]] = await response.json()
        rank = {"critical": 0, "warning": 1}
        return sorted(alerts, key=lambda alert: rank.get(alert["labels"]["severity"], 2))


@asynccontextmanager
async def alerting(session: aiohttp.ClientSession, folder: Path, collector_url: str) -> AsyncIterator[Alerting | None]:
    """Run both programs while the block lasts; yield None if they are not installed."""
    manager = next(filter(None, map(shutil.which, _ALERTMANAGERS)), None)
    prometheus = shutil.which("prometheus")
    if manager is None or prometheus is None:
        yield None
        return
    async with AsyncExitStack() as stack:
        port = await _start(
            stack,
            manager,
            f"--config.file={resource('alertmanager') / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}",
            "--cluster.listen-address=",
        )
        await _start(
            stack,
            prometheus,
            f"--config.file={_configuration(folder, collector_url, f'127.0.0.1:{port}')}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
        )
        yield Alerting(session, f"http://127.0.0.1:{port}")


def _configuration(folder: Path, collector_url: str, alertmanager: str) -> Path:
    """Write the shipped files with the demo's ports and an interval of one second instead of five."""
    collector = collector_url.removeprefix("http://")
    source = resource("prometheus")
    (folder / "foreshock.rules.yml").write_text(rule_file(Addresses(collector=collector_url)))
    text = (source / "prometheus.yml").read_text()
    for default, ours in (("127.0.0.1:9327", collector), ("127.0.0.1:9093", alertmanager), ("5s", "1s")):
        assert default in text
        text = text.replace(default, ours)
    (folder / "prometheus.yml").write_text(text.replace("4s", "1s"))
    return folder / "prometheus.yml"


async def _start(stack: AsyncExitStack, program: str, *options: str) -> int:
    """Start a program on a free port and return the port."""
    process = await asyncio.create_subprocess_exec(
        *(program, "--web.listen-address=127.0.0.1:0", *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stack.push_async_callback(asyncio.wait, {asyncio.create_task(_listen(process.stderr, port))})
    stack.push_async_callback(end, process, seconds=_END_SECONDS)
    try:
        return await asyncio.wait_for(port, _START_SECONDS)
    except (TimeoutError, EOFError) as error:
        raise DemoError(f"{program} did not start: {error}") from error


async def _listen(stream: asyncio.StreamReader, port: asyncio.Future[int]) -> None:
    """Find the port in a program's log, and keep reading so that the program never blocks on a full pipe."""
    line = b""
    while text := await stream.readline():
        line = text
        if not port.done() and (found := _LISTENING.search(text)):
            port.set_result(int(found[1]))
    if not port.done():
        port.set_exception(EOFError(line.decode(errors="replace").strip()))
