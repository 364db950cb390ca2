"""The run of Trackio that the script has open."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from foreshock._mirror.tool import PREFIX

_TITLE = "Foreshock"


class Run:
    """Writes into Trackio's current run, by time: a row with a step would move the script's own steps."""

    def __init__(self, module: Any, run: Any) -> None:
        self._module, self._run = module, run

    @property
    def closed(self) -> bool:
        return _current(self._module) is not self._run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log_system({f"{PREFIX}step": step, **values})

    def notify(self, text: str) -> None:
        self._run.alert(_TITLE, text)

    def link(self, page: str) -> None:
        self._run.alert(_TITLE, page, self._module.AlertLevel.INFO)

    def flush(self) -> None:
        """Do nothing: it has its own end of the process."""


def find() -> Run | None:
    """Return the current run; None without one."""
    module = sys.modules.get("trackio")
    run = None if module is None else _current(module)
    return None if run is None else Run(module, run)


def _current(module: Any) -> Any:
    return module.context_vars.current_run.get()
