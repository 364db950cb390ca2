"""The run of MLflow that the script has open."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from foreshock._mirror.tool import NOTICE, PAGE


class Run:
    """Writes into MLflow's active run, asynchronously: a server that does not answer must not hold up a step."""

    def __init__(self, module: Any, identity: str) -> None:
        self._module, self._identity = module, identity

    @property
    def closed(self) -> bool:
        return _active(self._module) != self._identity

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(values), step=step, run_id=self._identity, synchronous=False)

    def notify(self, text: str) -> None:
        self._module.set_tag(NOTICE, text, synchronous=False)

    def link(self, page: str) -> None:
        self._module.set_tag(PAGE, page, synchronous=False)

    def flush(self) -> None:
        """Do nothing: it has its own end of the process."""


def find() -> Run | None:
    """Return the active run; None without one."""
    module = sys.modules.get("mlflow")
    identity = "" if module is None else _active(module)
    return Run(module, identity) if identity else None


def _active(module: Any) -> str:
    run = module.active_run()
    return "" if run is None else str(run.info.run_id)
