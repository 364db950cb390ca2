"""Writes the dashboards and the alert rules: `python -m grafana.make`; with --check it only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from grafana.dashboards import DASHBOARDS
from grafana.rules import alerting

HERE = Path(__file__).parent
RULES = HERE.parent / "deploy/prometheus/foreshock.rules.yml"
_HEAD = "# Made by `make dashboards` from deploy/prometheus/foreshock.rules.yml: change it there.\n"


def files() -> dict[Path, str]:
    """What is to be written, by path."""
    made = {
        HERE / f"dashboards/{name}.json": json.dumps(build(), indent=2) + "\n" for name, build in DASHBOARDS.items()
    }
    groups = yaml.safe_load(RULES.read_text())["groups"]
    text = yaml.safe_dump(alerting(groups), sort_keys=False, width=120, allow_unicode=True)
    made[HERE / "provisioning/alerting/foreshock.yml"] = _HEAD + text
    return made


def main(arguments: list[str]) -> int:
    """0: written, or up to date; 1: --check found a difference."""
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(HERE.parent)} is not what its sources say; run: make dashboards\n")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files()[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
