"""The command: a collector in this process, three acts one after the other, and whether they went as announced."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.padding import Padding

from foreshock_collector.commands.demo import DemoError
from foreshock_collector.commands.demo.alerting import Alerting, alerting
from foreshock_collector.commands.demo.rendering import SHOWN_STEPS, Steps, alert_lines, live_table, verdict_on_act
from foreshock_collector.commands.demo.training import RANKS, check_torch, training
from foreshock_collector.commands.verdict_text import story
from foreshock_collector.config import Config, ConfigError, Parser
from foreshock_collector.server import Server

_POLL_SECONDS = 0.15
_SETTLE_SECONDS = 20.0
_ALERT_SECONDS = 15.0
_TOO_HIGH, _MODERATE = "3.0", "0.2"
_CLIP = "0.05"
"""About a third of this model's usual gradient norm."""
_NAN_STEP = 120
_LAST_STEPS = 20


class NotAsAnnouncedError(Exception):
    """An act went another way; the text says how."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over, as the API tells it."""

    run: dict[str, Any]
    steps: Steps

    @property
    def incident(self) -> dict[str, Any]:
        """The only one. Raises `NotAsAnnouncedError`."""
        if len(self.run["incidents"]) != 1:
            raise NotAsAnnouncedError(f"{len(self.run['incidents'])} incidents instead of one")
        incident: dict[str, Any] = self.run["incidents"][0]
        return incident

    @property
    def losses(self) -> list[float]:
        """Finite ones, in the order of steps."""
        return [loss for loss in self.steps["loss"] if loss is not None]


def main(arguments: list[str]) -> int:
    """0: all three acts went as announced; 1: one did not; 2: it cannot be shown here; 130: interrupted."""
    parser = Parser(prog="foreshock demo", description=__doc__)
    parser.add_argument(
        "--seconds-per-step", type=float, default=0.1, metavar="SECONDS", help="pace of the training (default: 0.1)"
    )
    console = Console(no_color=True if "NO_COLOR" in os.environ else None)
    try:
        options = parser.parse_args(arguments)
        check_torch()
        with tempfile.TemporaryDirectory(prefix="foreshock-demo-", ignore_cleanup_errors=True) as folder:
            return asyncio.run(_perform(Path(folder), console, str(options.seconds_per_step)))
    except (ConfigError, DemoError, OSError) as error:
        sys.stderr.write(f"foreshock demo: {error}\n")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; all processes are gone")
        return 130


async def _perform(folder: Path, console: Console, pace: str) -> int:
    began = time.monotonic()
    config = Config(grpc_port=0, http_port=0, database=str(folder / "foreshock.db"), ack_seconds=0.25)
    async with (
        Server(config) as server,
        aiohttp.ClientSession() as session,
        alerting(session, folder, server.url) as alerts,
    ):
        console.print(f"Collector, in this process: [bold]{server.url}[/bold], records to {server.address}.")
        if alerts is None:
            console.print("Prometheus and Alertmanager are not installed: the alerts are not shown.")
        else:
            console.print("Prometheus and Alertmanager run beside it, with the shipped rules, looking every second.")
        stage = _Stage(server, session, alerts, folder, console, pace)
        try:
            best = await _explodes(stage)
            await _survives(stage, best)
            await _meets_a_bad_batch(stage)
        except NotAsAnnouncedError as error:
            verdict_on_act(console, False, str(error))
            return 1
    console.print(
        f"Three acts in {time.monotonic() - began:.0f} s. In your own script, on every rank, after DDP(model):"
    )
    console.print("    watch = foreshock.attach(model, optimizer, clip=1.0)", highlight=False)
    return 0


async def _explodes(stage: _Stage) -> float:
    """The loss of its best step."""
    stage.announce("Act 1", f"a learning rate that rises to {_TOO_HIGH}, too high for this model; nothing is injected")
    ended = await stage.train("explodes", "--steps=200", f"--learning-rate={_TOO_HIGH}")
    incident = ended.incident
    verdict = incident["verdict"]
    await stage.tell(incident, "explodes", "ForeshockExplodingGradients")
    warned = [event["step"] for event in ended.run["events"] if event["kind"] == "build_up"]
    bad = verdict["first_bad_step"]
    if verdict["cause"] != "exploding_gradients" or not any(step < bad for step in warned):
        raise NotAsAnnouncedError(f"no build-up was seen before step {bad}; the verdict is {verdict['cause']}")
    first = min(warned)
    steps = f"{bad - first} step{'s' if bad - first > 1 else ''}"
    verdict_on_act(stage.console, True, f"the build-up was seen at step {first}, {steps} before the end at step {bad}.")
    return min(ended.losses)


async def _survives(stage: _Stage, best: float) -> None:
    stage.announce("Act 2", f"the same model, data and learning rate, attached with clip={_CLIP}")
    ended = await stage.train("survives", "--steps=200", f"--learning-rate={_TOO_HIGH}", f"--clip={_CLIP}")
    if ended.run["incidents"]:
        raise NotAsAnnouncedError(ended.run["incidents"][0]["verdict"]["summary"])
    last = ended.losses[-_LAST_STEPS:]
    loss = sum(last) / len(last)
    text = f"loss {loss:.3f} over the last {len(last)} steps; the best single step of act 1 was {best:.3f}."
    if len(ended.steps["step"]) < 200 or loss >= best:
        raise NotAsAnnouncedError(text)
    clipped = ended.run["counters"]["clipped"]
    verdict_on_act(stage.console, True, f"{clipped} of {len(ended.steps['step'])} steps clipped, {text}")


async def _meets_a_bad_batch(stage: _Stage) -> None:
    stage.announce("Act 3", f"a learning rate of {_MODERATE}, and at step {_NAN_STEP} one NaN in the batch of rank 1")
    ended = await stage.train("bad-batch", "--steps=200", f"--learning-rate={_MODERATE}", f"--nan-at={_NAN_STEP}")
    verdict = ended.incident["verdict"]
    await stage.tell(ended.incident, "bad-batch", "ForeshockSuddenNonFinite")
    found = (verdict["cause"], verdict["rank"], verdict["first_bad_step"])
    if found != ("sudden_nonfinite", 1, _NAN_STEP):
        raise NotAsAnnouncedError(f"the verdict is {found[0]}, rank {found[1]}, step {found[2]}")
    verdict_on_act(stage.console, True, "no explosion, and rank 1 is named.")


class _Stage:
    """Where acts are played: what they share, and how each is run, watched and told."""

    def __init__(
        self,
        server: Server,
        session: aiohttp.ClientSession,
        alerts: Alerting | None,
        folder: Path,
        console: Console,
        pace: str,
    ) -> None:
        self._server = server
        self._session = session
        self._alerts = alerts
        self._folder = folder
        self._pace = pace
        self.console = console

    def announce(self, act: str, text: str) -> None:
        """What is about to be tried."""
        self.console.rule(f"[bold]{act}[/bold]", align="left")
        self.console.print(f"{text[0].upper()}{text[1:]}. Starting {RANKS} ranks...")

    async def train(self, run: str, *options: str) -> Ended:
        """Run a job to its end, and show its steps as the collector gets them."""
        job = training(
            run,
            collector=self._server.address,
            folder=self._folder,
            options=[*options, f"--seconds-per-step={self._pace}"],
        )
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            async with job as ended:
                while not ended.done():
                    await asyncio.sleep(_POLL_SECONDS)
                    await self._show(run, live)
                await ended
            result = await self._over(run)
            live.update(live_table(run, result.steps, result.run["events"]), refresh=True)
        if not self.console.is_terminal:
            self.console.line()  # there the table ends without one
        return result

    async def tell(self, incident: dict[str, Any], run: str, alert: str) -> None:
        """The story, and what Alertmanager makes of it."""
        self.console.print(Padding(story(incident["verdict"]), (1, 2)))
        if self._alerts is None:
            return
        deadline = time.monotonic() + _ALERT_SECONDS
        while True:
            found = await self._alerts.alerts(run)
            if any(each["labels"]["alertname"] == alert for each in found) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        if not any(each["labels"]["alertname"] == alert for each in found):
            raise NotAsAnnouncedError(f"{alert} has not fired within {_ALERT_SECONDS:.0f} s")
        self.console.print(alert_lines(found))

    async def _show(self, run: str, live: Live) -> None:
        told = await self._get(f"/api/v1/runs/{run}")
        if told is not None:
            after = max(0, told["counters"]["steps"] - SHOWN_STEPS)
            steps = await self._get(f"/api/v1/runs/{run}/steps?after={after}")
            if steps is not None:
                live.update(live_table(run, steps, told["events"]), refresh=True)

    async def _over(self, run: str) -> Ended:
        """Ranks may leave a moment before the last of their steps is put together."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            told = await self._get(f"/api/v1/runs/{run}")
            if told is not None and told["attempts"][-1]["over"]:
                break
            if time.monotonic() > deadline:
                raise DemoError(f"run {run} did not end at the collector within {_SETTLE_SECONDS:.0f} s")
            await asyncio.sleep(_POLL_SECONDS)
        steps = await self._get(f"/api/v1/runs/{run}/steps?limit=10000")
        assert steps is not None
        return Ended(run=told, steps=steps)

    async def _get(self, path: str) -> dict[str, Any] | None:
        """An answer of the API; None while it does not know the run."""
        async with self._session.get(self._server.url + path) as response:
            answer: dict[str, Any] = await response.json()
        return answer if response.status == 200 else None
