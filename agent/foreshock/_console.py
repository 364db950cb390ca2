"""What Foreshock says on a rank's standard error: plain lines, few, and each problem once."""

from __future__ import annotations

import sys
from contextlib import suppress

_said: set[str] = set()


def say(line: str) -> None:
    """Write one line. Where standard error is closed or gone, nobody hears it, and training goes on."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"foreshock: {line}\n")
        sys.stderr.flush()


def say_once(key: str, line: str) -> None:
    """Write one line, unless this process has already written one about `key`."""
    if key not in _said:
        _said.add(key)
        say(line)
