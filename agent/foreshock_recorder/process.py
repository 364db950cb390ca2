"""What /proc says about a process: when it started, and its status once it has ended."""

from __future__ import annotations

from pathlib import Path

_ENDED = (b"Z", b"X")
"""States of a process that has ended, and whose parent has not waited for it yet."""


def start_ticks(pid: int) -> int | None:
    """Return the clock ticks after boot at which a process started; None if it has ended or never was."""
    fields = _fields(pid)
    return None if fields is None or fields[0] in _ENDED else int(fields[19])


def zombie_status(pid: int, started: int) -> int | None:
    """Return the wait status of a process that has ended, until its parent asks for it.

    started: its clock ticks after boot, since another process may have the same number by now.
    """
    fields = _fields(pid)
    if fields is None or fields[0] not in _ENDED or int(fields[19]) != started:
        return None
    return int(fields[-1])


def _fields(pid: int) -> list[bytes] | None:
    """Fields of /proc/PID/stat from the third one, the state."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may itself hold parentheses and spaces: fields count from the last one.
    return stat[stat.rindex(b")") + 2 :].split()
