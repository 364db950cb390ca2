"""The collector, with a clock that the benchmark can set: its offset is in the file `CLOCK` names."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

CLOCK = "CHAOS_CLOCK"


def _set_clock(path: Path) -> None:
    real = time.time
    # Before the collector is imported: its clock takes the function as it is then.
    time.time = lambda: real() + float(path.read_text())


if __name__ == "__main__":
    _set_clock(Path(os.environ[CLOCK]))
    from foreshock_collector.commands.cli import collector

    sys.exit(collector(sys.argv[1:]))
