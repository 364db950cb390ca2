"""What the shipped rules make of series: promtool is asked to find nothing, and says what it found."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.alerting import ALERTS, RULES, SEVERITY
from tests.support.yaml_text import parsed

SCRAPE_SECONDS = 15
_UNITS = {"h": 3600, "m": 60, "s": 1}
_QUOTED = r'(\w+)=("(?:[^"\\]|\\.)*")'


def seconds_of(time: str) -> int:
    """Of "39m45s"."""
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([hms])", time))


class Fired(NamedTuple):
    """An alert of one of the tests."""

    test: str
    alert: str
    time: str
    """As the test gave it."""
    labels: dict[str, str]
    annotations: dict[str, str]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=500, check=False)


def quiet(series: dict[str, list[str]], name: str, times: Iterable[str]) -> dict[str, Any]:
    """A test of promtool by which nothing fires. series: values a scrape from 0 on, `_`: none, `stale`: it failed."""
    return {
        "name": name,
        "interval": f"{SCRAPE_SECONDS}s",
        "input_series": [{"series": one, "values": " ".join(values)} for one, values in series.items()],
        "alert_rule_test": [
            {"eval_time": time, "alertname": alert["alert"], "exp_alerts": []} for time in times for alert in ALERTS
        ],
    }


def fired_in(tests: list[dict[str, Any]], folder: Path) -> list[Fired]:
    """All that does. The tests' names differ."""
    suite = {"rule_files": [str(RULES)], "evaluation_interval": f"{SCRAPE_SECONDS}s", "tests": tests}
    (folder / "quiet.yml").write_text(json.dumps(suite, ensure_ascii=False))
    done = promtool("test", "rules", folder / "quiet.yml")
    said = done.stdout + done.stderr
    assert "SUCCESS" in said or "got:[" in said, said
    found = []
    for part in re.split(r"^\s+name: ", said, flags=re.MULTILINE)[1:]:
        name = part.partition(",\n")[0]
        for one in re.split(r"^\s+alertname: ?", part, flags=re.MULTILINE)[1:]:
            alert, time = re.match(r"(\w+), time: (\w+)", one).groups()  # type: ignore[union-attr]
            texts = re.findall(r"Labels:{(.*)}\n\s+Annotations:{(.*)}", one)
            found += [Fired(name, alert, time, _known(labels), _known(annotations)) for labels, annotations in texts]
    return found


class Expectation(NamedTuple):
    """What a scenario expects of an alert at a time: some of it, or nothing."""

    scenario: str
    alert: str
    seconds: int
    nothing: bool


@cache
def judged(file: Path) -> tuple[Counter[Expectation], Counter[Expectation], str]:
    """What promtool finds wrong where each expectation stands beside its opposite; the opposites; what it says.

    It evaluates the rules once for both.
    """
    suite = parsed(file.read_text())
    suite["rule_files"] = [str(RULES)]
    opposites: Counter[Expectation] = Counter()
    for test in suite["tests"]:
        for stated in list(test["alert_rule_test"]):
            fires, name = bool(stated.get("exp_alerts")), stated["alertname"]
            expected = [] if fires else [{"exp_labels": {"severity": SEVERITY[name]}}]
            test["alert_rule_test"].append({**stated, "exp_alerts": expected})
            opposites[Expectation(test["name"], name, seconds_of(stated["eval_time"]), fires)] += 1
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as both:
        json.dump(suite, both, ensure_ascii=False)
        both.flush()
        done = promtool("test", "rules", both.name)
    said = done.stdout + done.stderr
    found = re.findall(r"name: (.*),\n\s+alertname: ?(\w+), time: (\w+),\s+exp:\[(\]?)", said)
    assert found and len(found) == said.count("alertname: "), said
    return (
        Counter(Expectation(name, alert, seconds_of(time), bool(end)) for name, alert, time, end in found),
        opposites,
        said,
    )


def _known(text: str) -> dict[str, str]:
    return {name: json.loads(value) for name, value in re.findall(_QUOTED, text)}
