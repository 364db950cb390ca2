"""The command: runs a collector in this process and three acts in sequence, and checks their outcome."""

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
from foreshock_collector.commands.demo.rendering import SHOWN_STEPS, Steps, alert_lines, live_table, print_outcome
from foreshock_collector.commands.demo.training import RANKS, check_torch, training
from foreshock_collector.commands.verdict_text import verdict_table
from foreshock_collector.config import Config, ConfigError, Parser
from foreshock_collector.server import Server

_POLL_SECONDS = 0.15
_FINISH_SECONDS = 20.0
_ALERT_SECONDS = 15.0
_TOO_HIGH, _MODERATE = "3.0", "0.2"
_CLIP = "0.05"
"""About a third of this model's usual gradient norm."""
_NAN_STEP = 120
_LAST_STEPS = 20
EXPLODES = ("--steps=200", f"--learning-rate={_TOO_HIGH}")
"""Options of the training job in act 1."""


class UnexpectedOutcomeError(Exception):
    """An act had a different outcome; the message says which."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """Holds the API's answer about a finished run."""

    run: dict[str, Any]
    steps: Steps

    @property
    def incident(self) -> dict[str, Any]:
        """Return the only incident. Raises `UnexpectedOutcomeError` if there are more or none."""
        if len(self.run["incidents"]) != 1:
            raise UnexpectedOutcomeError(f"{len(self.run['incidents'])} incidents instead of one")
        incident: dict[str, Any] = self.run["incidents"][0]
        return incident

    @property
    def losses(self) -> list[float]:
        """Return the finite losses, in step order."""
        return [loss for loss in self.steps["loss"] if loss is not None]


def main(arguments: list[str]) -> int:
    """Return 0 if all three acts went as expected, 1 if not, 2 if the demo cannot run, 130 if interrupted."""
    parser = Parser(
        prog="foreshock demo",
        description="Run three small training jobs: one explodes, one survives with clipping, one meets a bad batch.",
    )
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
        console.print("interrupted; all processes have ended")
        return 130


async def _perform(folder: Path, console: Console, pace: str) -> int:
    began = time.monotonic()
    config = Config(grpc_port=0, http_port=0, database=str(folder / "foreshock.db"), ack_seconds=0.25)
    async with (
        Server(config) as server,
        aiohttp.ClientSession() as session,
        alerting(session, folder, server.url) as alerts,
    ):
        console.print(f"Collector in this process: [bold]{server.url}[/bold], records to {server.address}.")
        if alerts is None:
            console.print("Prometheus and Alertmanager are not installed, so no alerts are shown.")
        else:
            console.print(
                "Prometheus and Alertmanager are running with the shipped rules and a scrape interval of one second."
            )
        stage = _Stage(server, session, alerts, folder, console, pace)
        try:
            best = await _explodes(stage)
            await _survives(stage, best)
            await _meets_a_bad_batch(stage)
        except UnexpectedOutcomeError as error:
            print_outcome(console, False, str(error))
            return 1
    console.print(
        f"Three acts in {time.monotonic() - began:.0f} s. In your own script, on every rank, after DDP(model):"
    )
    console.print("    watch = foreshock.attach(model, optimizer, clip=1.0)", highlight=False)
    return 0


async def _explodes(stage: _Stage) -> float:
    """Run act 1 and return its lowest loss."""
    stage.announce("Act 1", f"the learning rate rises to {_TOO_HIGH}, too high for this model; no fault is injected")
    ended = await stage.train("explodes", *EXPLODES)
    incident = ended.incident
    verdict = incident["verdict"]
    await stage.show_incident(incident, "explodes", "ForeshockExplodingGradients")
    warned = [event["step"] for event in ended.run["events"] if event["kind"] == "build_up"]
    bad = verdict["first_bad_step"]
    if verdict["cause"] != "exploding_gradients" or not any(step < bad for step in warned):
        raise UnexpectedOutcomeError(f"no build-up was detected before step {bad}; the verdict is {verdict['cause']}")
    first = min(warned)
    steps = f"{bad - first} step{'s' if bad - first > 1 else ''}"
    print_outcome(
        stage.console, True, f"build-up detected at step {first}, {steps} before the explosion at step {bad}."
    )
    return min(ended.losses)


async def _survives(stage: _Stage, best: float) -> None:
    stage.announce("Act 2", f"the same model, data and learning rate, attached with clip={_CLIP}")
    ended = await stage.train("survives", *EXPLODES, f"--clip={_CLIP}")
    if ended.run["incidents"]:
        raise UnexpectedOutcomeError(ended.run["incidents"][0]["verdict"]["summary"])
    last = ended.losses[-_LAST_STEPS:]
    loss = sum(last) / len(last)
    text = f"mean loss {loss:.3f} over the last {len(last)} steps; the best single step of act 1 had {best:.3f}."
    if len(ended.steps["step"]) < 200 or loss >= best:
        raise UnexpectedOutcomeError(text)
    clipped = ended.run["counters"]["clipped"]
    print_outcome(stage.console, True, f"{clipped} of {len(ended.steps['step'])} steps clipped, {text}")


async def _meets_a_bad_batch(stage: _Stage) -> None:
    stage.announce(
        "Act 3", f"a moderate learning rate of {_MODERATE}; at step {_NAN_STEP} the batch of rank 1 contains one NaN"
    )
    ended = await stage.train("bad-batch", "--steps=200", f"--learning-rate={_MODERATE}", f"--nan-at={_NAN_STEP}")
    verdict = ended.incident["verdict"]
    await stage.show_incident(ended.incident, "bad-batch", "ForeshockSuddenNonFinite")
    found = (verdict["cause"], verdict["rank"], verdict["first_bad_step"])
    if found != ("sudden_nonfinite", 1, _NAN_STEP):
        raise UnexpectedOutcomeError(f"the verdict is {found[0]}, rank {found[1]}, step {found[2]}")
    print_outcome(stage.console, True, "no explosion, and the verdict names rank 1.")


class _Stage:
    """Runs acts against the shared collector, and shows their steps, verdicts and alerts."""

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
        """Print the title of an act and what it tries."""
        self.console.rule(f"[bold]{act}[/bold]", align="left")
        self.console.print(f"{text[0].upper()}{text[1:]}. Starting {RANKS} ranks...")

    async def train(self, run: str, *options: str) -> FinishedRun:
        """Run a job to its end and show its steps as the collector receives them."""
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
            result = await self._finished(run)
            live.update(live_table(run, result.steps, result.run["events"]), refresh=True)
        if not self.console.is_terminal:
            self.console.line()  # the table ends without a line break there
        return result

    async def show_incident(self, incident: dict[str, Any], run: str, alert: str) -> None:
        """Show the verdict and the alerts that follow from it."""
        self.console.print(Padding(verdict_table(incident["verdict"]), (1, 2)))
        if self._alerts is None:
            return
        deadline = time.monotonic() + _ALERT_SECONDS
        while True:
            found = await self._alerts.alerts(run)
            if any(each["labels"]["alertname"] == alert for each in found) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        if not any(each["labels"]["alertname"] == alert for each in found):
            raise UnexpectedOutcomeError(f"{alert} has not fired within {_ALERT_SECONDS:.0f} s")
        self.console.print(alert_lines(found))

    async def _show(self, run: str, live: Live) -> None:
        answer = await self._get(f"/api/v1/runs/{run}")
        if answer is not None:
            after = max(0, answer["counters"]["steps"] - SHOWN_STEPS)
            steps = await self._get(f"/api/v1/runs/{run}/steps?after={after}")
            if steps is not None:
                live.update(live_table(run, steps, answer["events"]), refresh=True)

    async def _finished(self, run: str) -> FinishedRun:
        """Wait until the run is over: ranks may exit shortly before their last steps are complete."""
        deadline = time.monotonic() + _FINISH_SECONDS
        while True:
            answer = await self._get(f"/api/v1/runs/{run}")
            if answer is not None and answer["attempts"][-1]["over"]:
                break
            if time.monotonic() > deadline:
                raise DemoError(f"run {run} did not end at the collector within {_FINISH_SECONDS:.0f} s")
            await asyncio.sleep(_POLL_SECONDS)
        steps = await self._get(f"/api/v1/runs/{run}/steps?limit=10000")
        assert steps is not None
        return FinishedRun(run=answer, steps=steps)

    async def _get(self, path: str) -> dict[str, Any] | None:
        """Return an answer of the API, or None while the run is unknown."""
        async with self._session.get(self._server.url + path) as response:
            answer: dict[str, Any] = await response.json()
        return answer if response.status == 200 else None
