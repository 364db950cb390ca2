"""The `SummaryWriter` that the script has open."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from typing import Any

from foreshock._mirror.tool import NOTICE, PAGE

_MODULES = ("torch.utils.tensorboard.writer", "tensorboardX.writer")


class Writer:
    """Writes into a `SummaryWriter` of torch or tensorboardX."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._step = 0

    @property
    def closed(self) -> bool:
        # To write after `close` would begin another file.
        return self._writer.file_writer is None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def notify(self, text: str) -> None:
        self._writer.add_text(NOTICE, text, self._step)

    def link(self, page: str) -> None:
        self._writer.add_text(PAGE, page)

    def flush(self) -> None:
        # Its thread ends with the process, whatever is still in its queue.
        self._writer.flush()


def find() -> Writer | None:
    """Return the open writer that was made first; None without one."""
    modules = filter(None, map(sys.modules.get, _MODULES))
    kinds = tuple(kind for module in modules if (kind := getattr(module, "SummaryWriter", None)) is not None)
    if not kinds:
        return None
    # Nobody keeps a list of them. By `type`, since `isinstance` runs code of objects that stand in for others.
    for each in gc.get_objects():
        if issubclass(type(each), kinds) and getattr(each, "file_writer", None) is not None:
            return Writer(each)
    return None
