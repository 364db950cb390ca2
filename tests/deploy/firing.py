"""What the shipped rules make of series: promtool is asked to find nothing, and says what it found."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.support.alerting import ALERTS, RULES

SCRAPE_SECONDS = 15
_QUOTED = r'(\w+)=("(?:[^"\\]|\\.)*")'


class Fired(NamedTuple):
    """An alert of one of the tests."""

    test: str
    alert: str
    time: str
    """As the test gave it."""
    labels: dict[str, str]
    annotations: dict[str, str]


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
    (folder / "quiet.yml").write_text(yaml.safe_dump(suite, width=10**6))
    command = ["promtool", "test", "rules", str(folder / "quiet.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
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


def _known(text: str) -> dict[str, str]:
    return {name: json.loads(value) for name, value in re.findall(_QUOTED, text)}
