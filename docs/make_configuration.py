"""Writes docs/configuration.md from the settings' own definitions; with --check, only says whether it is up to date."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from foreshock._variables import COLLECTOR_PREFIX, VARIABLES
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.config import Config

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every environment variable and every setting of a file. Made from `agent/foreshock/_variables.py`,
`collector/foreshock_collector/config.py` and `analysis/rules.py` by `make docs`; do not edit by hand.

## Where ranks run, and for the commands

An argument of `foreshock.attach` wins over its variable, an empty variable is as good as none. A variable that begins
with `FORESHOCK_` and is none of these is ignored, and rank 0 says so with the nearest name that is one."""
COLLECTOR = """Of others' variables a probe reads `LOCAL_RANK`, `SLURM_LOCALID`, `SLURMD_NODENAME`, `SLURM_JOB_ID` (the
run is then `slurm-JOB`) and `TORCHELASTIC_RUN_ID` (the run's name, where torchrun was given an `--rdzv-id`). Commands
obey `NO_COLOR`.

## The collector

A flag wins over its variable, that over the file of `--config` (or `FORESHOCK_COLLECTOR_CONFIG`), that over the
default. In the file a setting is named as in the first column. A variable that is nearly one of these is told at
the start, with the name that was meant."""
RULES = """The file is TOML:

```toml
host = "10.0.0.7"
allow_unauthenticated = true
database = "/var/lib/foreshock/foreshock.db"

[runs."llm-*"]            # runs whose name fits the pattern
recovered_after = 100

[runs."llm-*".gradient]
spike_z = 8.0
```

## Rules of detection

By run, in the collector's file as above: every pattern that fits a run's name changes what it names, in the order of
the file. For one recorded log: `foreshock diagnose --set gradient.spike_z=8`. [detection.md](detection.md) says what
they mean together, and how the defaults were chosen. A text that ends with dots goes on in the next line."""
TAIL = """## Other files

| file | what it sets |
| --- | --- |
| `/etc/foreshock/collector.env` | variables of the collector, for `deploy/systemd/foreshock-collector.service` |
| `deploy/prometheus/prometheus.yml` | what Prometheus scrapes: the collector's `/metrics` |
| `deploy/prometheus/foreshock.rules.yml` | the alerts, and the [addresses in them](deploy.md#links-in-alerts) |
| `deploy/alertmanager/alertmanager.yml` | an example of who is told |
| `grafana/provisioning/`, `grafana/dashboards/` | [data source, dashboards, alert rules](grafana.md) |
"""


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/configuration.md is not what the settings say; run: make docs")


def page() -> str:
    """The whole page."""
    variables = [(f"`{v.name}`", _value(v.default), v.meaning) for v in VARIABLES]
    settings = [
        (f"`{name}`", f"`--{name.replace('_', '-')}`", f"`{COLLECTOR_PREFIX}{name.upper()}`", _value(default), meaning)
        for name, default, meaning in _documented(Config)
        if name != "runs"
    ]
    groups = [(name, value) for name, value, _ in _members(DEFAULT) if is_dataclass(value)]
    single = [
        (f"`{name}`", _value(value), _range(DEFAULT, name), meaning)
        for name, value, meaning in _members(DEFAULT)
        if (name, value) not in groups
    ]
    parts = [
        HEAD,
        _table(("variable", "default", "meaning"), variables),
        COLLECTOR,
        _table(("setting", "flag", "variable", "default", "meaning"), settings),
        RULES,
        _table(("rule", "default", "range", "meaning"), single),
    ]
    channels = {name: value for name, value in groups if name != "faults"}
    both = [
        (
            f"`{name}`",
            *(_value(getattr(channel, name)) for channel in channels.values()),
            _range(channels["gradient"], name),
            meaning,
        )
        for name, _, meaning in _members(channels["gradient"])
    ]
    parts.append("How the gradient's norm and the loss are judged, each a group of its own (`gradient.spike_z`):")
    parts.append(_table(("rule", *(f"`{name}`" for name in channels), "range", "meaning"), both))
    faults = [
        (f"`faults.{name}`", _value(value), _range(DEFAULT.faults, name), meaning)
        for name, value, meaning in _members(DEFAULT.faults)
    ]
    parts.append("Troubles that last, though every number is finite:")
    parts.append(_table(("rule", "default", "range", "meaning"), faults))
    return "\n\n".join((*parts, TAIL))


def _documented(kind: type[Any]) -> list[tuple[str, Any, str]]:
    """Name, default and docstring of each field of a dataclass, in order."""
    defaults = {field.name: field.default for field in fields(kind)}
    return [(name, defaults[name], text) for name, text in _docstrings(kind).items()]


def _members(group: Any) -> list[tuple[str, Any, str]]:
    """The same of an instance: its values."""
    texts = _docstrings(type(group))
    return [(field.name, getattr(group, field.name), texts.get(field.name, "")) for field in fields(group)]


def _range(group: Any, name: str) -> str:
    """What a rule may be."""
    (rule,) = (field for field in fields(group) if field.name == name)
    least, most = rule.metadata.get("range", (None, None))
    return "true or false" if least is None else f"{least:g} to {most:g}"


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """The text under each field."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            told = text.value if isinstance(text, ast.Constant) else ""
            found[field.target.id] = " ".join(str(told).split())
    return found


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _value(value: Any) -> str:
    if value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    main()
