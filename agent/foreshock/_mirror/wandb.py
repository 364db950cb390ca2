"""The run of Weights & Biases that the script has open."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from foreshock._mirror.tool import NOTICE, PAGE, PREFIX, size

_STEP = f"{PREFIX}step"


class Run:
    """Writes into `wandb.run`, together with the script's next row: a row of its own would move the script's steps."""

    def __init__(self, module: Any) -> None:
        self._module, self._run = module, module.run
        self._row: int | None = None
        self._size = (False, 0.0)
        """That of what the row has."""
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric(f"{PREFIX}*", step_metric=_STEP)

    @property
    def closed(self) -> bool:
        return self._module.run is not self._run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # A script that logs seldom has many steps in a row, of which the last would replace all others. Its public
        # `step` waits for another process.
        row = getattr(self._run, "_local_step", None)
        if row is None or row != self._row or size(values) >= self._size:
            self._row, self._size = row, size(values)
            self._run.log({_STEP: step, **values}, commit=False)

    def notify(self, text: str) -> None:
        self._run.summary[NOTICE] = text

    def link(self, page: str) -> None:
        self._run.config.update({PAGE: page}, allow_val_change=True)

    def flush(self) -> None:
        """Do nothing: it has its own end of the process."""


def find() -> Run | None:
    """Return the open run; None without one."""
    module = sys.modules.get("wandb")
    return None if getattr(module, "run", None) is None else Run(module)
