"""Generate docs/configuration.md from the settings' definitions; with --check, only verify that it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from foreshock._attach.variables import COLLECTOR_PREFIX, VARIABLES
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.config import Config
from foreshock_collector.settings import doc_of, range_of

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

All environment variables and configuration file settings. `make docs` generates this page from
`agent/foreshock/_attach/variables.py`, `collector/foreshock_collector/config.py` and
`collector/foreshock_collector/analysis/rules.py`; do not edit it by hand.

## Ranks and commands

An argument of `foreshock.attach` overrides its variable. An empty variable counts as unset. An unknown variable that
begins with `FORESHOCK_` is ignored; rank 0 logs a warning with the closest known name."""
COLLECTOR = """The probe also reads `LOCAL_RANK`, `SLURM_LOCALID`, `SLURMD_NODENAME`, `SLURM_JOB_ID` (which names the
run `slurm-JOB`) and `TORCHELASTIC_RUN_ID` (the run's name, if torchrun was given an `--rdzv-id`). Commands respect
`NO_COLOR`.

## Collector

A flag overrides its variable, the variable overrides the file given by `--config` (or `FORESHOCK_COLLECTOR_CONFIG`),
and the file overrides the default. The file uses the names in the first column. At startup the collector warns about
misspelled variables and suggests the correct name."""
RULES = """The file is TOML:

```toml
host = "10.0.0.7"
allow_unauthenticated = true
database = "/var/lib/foreshock/foreshock.db"

[runs."llm-*"]            # runs whose name matches the pattern
recovered_after = 100

[runs."llm-*".gradient]
spike_z = 8.0
```

## Detection rules

Set rules per run in the collector's file, as above. Every pattern that matches a run's name applies, in the order of
the file. For a recorded log, use `foreshock diagnose --set gradient.spike_z=8`. [detection.md](detection.md) explains
how the rules work together and how the defaults were chosen."""
TAIL = """## Other files

| file | what it sets |
| --- | --- |
| `/etc/foreshock/collector.env` | environment of the collector, for `deploy/systemd/foreshock-collector.service` |
| `/etc/foreshock/agent.env` | environment of ranks and recorders, for `deploy/slurm` and `deploy/systemd` |
| `deploy/helm/foreshock/values.yaml` | [the collector in Kubernetes](deploy.md#in-kubernetes) |
| `deploy/prometheus/prometheus.yml` | the scrape configuration for the collector's `/metrics` |
| `deploy/prometheus/foreshock.rules.yml` | the alerts, and the [addresses in their links](deploy.md#links-in-alerts) |
| `deploy/alertmanager/alertmanager.yml` | an example of routing alerts to receivers |
| `grafana/provisioning/`, `grafana/dashboards/` | [data source, dashboards, alert rules](grafana.md) |
"""


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/configuration.md is out of date; run: make docs")


def page() -> str:
    """Return the whole page."""
    variables = [(f"`{v.name}`", _value(v.default), v.meaning) for v in VARIABLES]
    settings = [
        (f"`{name}`", f"`--{name.replace('_', '-')}`", f"`{COLLECTOR_PREFIX}{name.upper()}`", _value(default), meaning)
        for name, default, meaning in _members(Config())
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
    parts.append("Rules for the gradient norm and the loss, each in its own group (`gradient.spike_z`):")
    parts.append(_table(("rule", *(f"`{name}`" for name in channels), "range", "meaning"), both))
    faults = [
        (f"`faults.{name}`", _value(value), _range(DEFAULT.faults, name), meaning)
        for name, value, meaning in _members(DEFAULT.faults)
    ]
    parts.append("Rules for lasting faults with finite values:")
    parts.append(_table(("rule", "default", "range", "meaning"), faults))
    return "\n\n".join((*parts, TAIL))


def _members(group: Any) -> list[tuple[str, Any, str]]:
    """Return the name, value and meaning of each field of an instance, in order."""
    return [(field.name, getattr(group, field.name), doc_of(field)) for field in fields(group)]


def _range(group: Any, name: str) -> str:
    """Return the permitted values of a rule, in words."""
    (rule,) = (field for field in fields(group) if field.name == name)
    limits = range_of(rule)
    return "true or false" if limits is None else f"{limits[0]:g} to {limits[1]:g}"


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
