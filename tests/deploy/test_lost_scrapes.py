"""A scrape that fails ends all series of the collector at once. One or two of them change nothing that people see."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.firing import SCRAPE_SECONDS, Fired, fired_in, quiet, seconds_of
from tests.support.alerting import SEVERITY
from tests.support.yaml_text import parsed

pytestmark = pytest.mark.integration

SUITES = sorted(Path(__file__).parent.glob("promtool/*.test.yml"))
LOST = (1, 3, 4)
"""Scrapes that fail after the one that a scenario is looked at: one alone, then two in a row."""
LOOKS = range(max(LOST) + 2)
Series = dict[str, list[str]]


def values(notation: str) -> list[str]:
    """Promtool's short forms written out: "_x2 1+2x3 stale"."""
    found: list[str] = []
    for token in notation.split():
        if token == "_" or token == "stale" or "x" not in token:
            found.append(token)
            continue
        start, _, count = token.partition("x")
        if start == "_":
            found += ["_"] * int(count)
            continue
        number, step = re.fullmatch(r"([\d.e]+?)([+-][\d.]+)?", start).groups()  # type: ignore[union-attr]
        found += [f"{float(number) + i * float(step or 0):g}" for i in range(int(count) + 1)]
    return found


def holed(series: Series, scrape: int) -> Series:
    """Those after this scrape fail."""
    lost = {scrape + after for after in LOST}
    return {
        name: ["stale" if place in lost and value != "_" else value for place, value in enumerate(known)]
        for name, known in series.items()
    }


@cache
def scenarios() -> dict[str, tuple[int, Series]]:
    """Of each alert the first in which it fires, and the healthy run: the scrape to look at, its series."""
    found: dict[str, tuple[int, Series]] = {}
    for suite in SUITES:
        for test in parsed(suite.read_text())["tests"]:
            series = {each["series"]: values(each["values"]) for each in test["input_series"]}
            for assertion in test["alert_rule_test"]:
                fires = assertion["alertname"] if assertion.get("exp_alerts") else ""
                quiet_ = f"nothing at {assertion['eval_time']}" if suite.name.startswith("healthy") else ""
                if name := fires or quiet_:
                    scrape = seconds_of(assertion["eval_time"]) // SCRAPE_SECONDS
                    found.setdefault(name, (scrape, series))
    return found


@pytest.fixture(scope="module")
def fired(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Fired]]:
    """By scenario, with all scrapes and with holes."""
    tests: list[dict[str, Any]] = []
    for name, (scrape, series) in scenarios().items():
        times = [f"{(scrape + after) * SCRAPE_SECONDS}s" for after in LOOKS]
        tests += [quiet(series, f"{name} whole", times), quiet(holed(series, scrape), f"{name} holed", times)]
    found: dict[str, list[Fired]] = {test["name"]: [] for test in tests}
    for each in fired_in(tests, tmp_path_factory.mktemp("gaps")):
        found[each.test].append(each)
    return found


def at(fired: list[Fired], scrape: int) -> dict[tuple[str, str], dict[str, str]]:
    """Alerts and their runs at this scrape, with what they say."""
    now = [each for each in fired if seconds_of(each.time) == scrape * SCRAPE_SECONDS]
    return {(each.alert, each.labels.get("run", "")): each.annotations for each in now}


def test_every_alert_is_tried_while_it_fires(fired: dict[str, list[Fired]]) -> None:
    for name in SEVERITY:
        assert name in {alert for alert, _ in at(fired[f"{name} whole"], scenarios()[name][0])}


@pytest.mark.parametrize("name", scenarios())
def test_lost_scrapes_neither_fire_nor_resolve_an_alert_nor_change_what_it_says(
    fired: dict[str, list[Fired]], name: str
) -> None:
    scrape, _ = scenarios()[name]
    for after in LOOKS:
        whole, holed_ = (at(fired[f"{name} {kind}"], scrape + after) for kind in ("whole", "holed"))
        assert holed_.keys() == whole.keys(), f"{after} scrapes later"
        for alert, said in holed_.items():
            assert {key for key, text in said.items() if text == "unknown"} == {
                key for key, text in whole[alert].items() if text == "unknown"
            }
