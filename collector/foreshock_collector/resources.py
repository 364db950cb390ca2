"""Data files of the collector: beside this module in a wheel, at the top of a source tree."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = {"prometheus": "deploy/prometheus", "alertmanager": "deploy/alertmanager", "runbooks": "docs/runbooks"}


def resource(name: str) -> Path:
    """Return the folder of "prometheus", "alertmanager" or "runbooks"."""
    installed = _HERE / "data" / name
    return installed if installed.is_dir() else _HERE.parents[1] / _SOURCES[name]
