"""Data files of the collector: beside this module in a wheel, at the top of a source tree."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
SOURCES = {
    "prometheus": "deploy/prometheus",
    "alertmanager": "deploy/alertmanager",
    "victoriametrics": "deploy/victoriametrics",
    "systemd": "deploy/systemd",
    "slurm": "deploy/slurm",
    "dashboards": "grafana/dashboards",
    "runbooks": "docs/runbooks",
}
"""Folders that the wheel holds, by name, and where a source tree has them. pyproject.toml lists the same."""


def resource(name: str) -> Path:
    """Return the folder with a name of `SOURCES`."""
    installed = _HERE / "data" / name
    return installed if installed.is_dir() else _HERE.parents[1] / SOURCES[name]
