"""A scrape that fails ends all series of the collector at once. One or two of them change nothing that people see."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import SEVERITY
from tests.deploy.firing import SCRAPE_SECONDS, Fired, fired_in, quiet

SUITES = sorted(Path(__file__).parent.glob("promtool/*.test.yml"))
GAPS = (1, 2)
_UNITS = {"h": 3600, "m": 60, "s": 1}
Series = dict[str, list[str]]


def seconds(time: str) -> int:
    """Of "39m45s"."""
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([hms])", time))


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


def without(series: Series, first: int, count: int) -> Series:
    """So many scrapes from this one on fail."""
    return {
        name: [
            "stale" if first <= place < first + count and value != "_" else value for place, value in enumerate(known)
        ]
        for name, known in series.items()
    }


@cache
def scenarios() -> dict[tuple[str, int], Series]:
    """Series by scenario, and the scrapes at which its suite looks."""
    found = {}
    for suite in SUITES:
        for test in yaml.safe_load(suite.read_text())["tests"]:
            series = {each["series"]: values(each["values"]) for each in test["input_series"]}
            for assertion in test["alert_rule_test"]:
                found[test["name"], seconds(assertion["eval_time"]) // SCRAPE_SECONDS] = series
    return found


@pytest.fixture(scope="module")
def fired(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Fired]]:
    tests: list[dict[str, Any]] = []
    for (name, scrape), series in scenarios().items():
        for gap in (0, *GAPS):
            times = [f"{(scrape + after) * SCRAPE_SECONDS}s" for after in range(max(GAPS) + 2)]
            tests.append(quiet(without(series, scrape + 1, gap), f"{name} at {scrape} without {gap}", times))
    found: dict[str, list[Fired]] = {test["name"]: [] for test in tests}
    for each in fired_in(tests, tmp_path_factory.mktemp("gaps")):
        found[each.test].append(each)
    return found


def names(fired: list[Fired], scrape: int) -> set[tuple[str, str]]:
    """Alerts and their runs at this scrape."""
    time = scrape * SCRAPE_SECONDS
    return {(each.alert, each.labels.get("run", "")) for each in fired if seconds_of(each) == time}


def seconds_of(fired: Fired) -> int:
    return seconds(fired.time)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize(("name", "scrape"), scenarios())
def test_lost_scrapes_neither_fire_nor_resolve_an_alert(
    fired: dict[str, list[Fired]], name: str, scrape: int, gap: int
) -> None:
    whole, holed = (fired[f"{name} at {scrape} without {lost}"] for lost in (0, gap))
    steady = [names(whole, scrape + after) for after in range(gap + 2)]
    always, ever = set.intersection(*steady), set.union(*steady)
    for after in range(gap + 2):
        now = names(holed, scrape + after)
        assert always <= now <= ever, f"{after} scrapes later"
    # What has begun meanwhile is seen with the first scrape that works again.
    assert names(holed, scrape + gap + 1) >= names(whole, scrape + gap + 1)


def test_every_alert_is_tried_while_it_fires(fired: dict[str, list[Fired]]) -> None:
    assert {each.alert for found in fired.values() for each in found} == SEVERITY.keys()


def test_what_an_alert_says_is_still_known_when_scrapes_are_lost(fired: dict[str, list[Fired]]) -> None:
    for name, scrape in scenarios():
        whole, holed = (fired[f"{name} at {scrape} without {lost}"] for lost in (0, max(GAPS)))
        said = {(each.alert, each.time): each.annotations for each in whole}
        for each in holed:
            before = said.get((each.alert, each.time))
            if before is not None:
                assert each.annotations.keys() == before.keys()
                assert [n for n, text in each.annotations.items() if text == "unknown" != before[n]] == [], each
