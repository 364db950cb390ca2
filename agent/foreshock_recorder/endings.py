"""How a rank ended that could not write its exit: by its wait status, and what the kernel counts of lacking memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

from foreshock_recorder.layout import ExitReason
from foreshock_recorder.process import start_ticks, zombie_status

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which a user or a scheduler ends a job."""
_CGROUPS = Path("/sys/fs/cgroup")
_INFO = struct.Struct("QQ11Ii")
"""struct pidfd_info: the mask of what is asked for and answered, the control group, ids, the wait status."""
_GET_INFO, _INFO_EXIT = 0xC040FF0B, 8
"""PIDFD_GET_INFO for that struct, PIDFD_INFO_EXIT."""


class ProcessEnd:
    """Watches one process from now until it ends. Needs a running loop.

    pid, started: as the rank wrote them; if no such process is visible here, nothing will be known of its end.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.status: int | None = None
        """Its wait status; None while it runs, or where its parent asked first and the kernel is an older one."""
        self._pid, self._started = pid, started
        self._accounts: list[Path] = []
        self._kills = 0
        self._descriptor: int | None = None
        with suppress(OSError):
            descriptor = os.pidfd_open(pid)
            if start_ticks(pid) != started:
                os.close(descriptor)
                return
            self._descriptor = descriptor
            self._accounts = _memory_accounts(Path(f"/proc/{pid}/cgroup").read_text())
            self._kills = _oom_kills(self._accounts)
            asyncio.get_running_loop().add_reader(descriptor, self._on_end)

    @property
    def pending(self) -> bool:
        """True while it is watched and runs."""
        return self._descriptor is not None

    @property
    def out_of_memory(self) -> bool:
        """True if the kernel has since killed a process of its control group for lack of memory."""
        return _oom_kills(self._accounts) > self._kills

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _on_end(self) -> None:
        # At once: after its parent has waited for it, only a newer kernel can still be asked.
        assert self._descriptor is not None
        self.status = zombie_status(self._pid, self._started)
        if self.status is None:
            self.status = _reaped_status(self._descriptor)
        self.close()


def exit_of(status: int | None, *, out_of_memory: bool, asked: bool, all_asked: bool) -> tuple[ExitReason, str]:
    """Return why a rank left, and what is known of it.

    status: its wait status, None: unknown. asked: it got SIGTERM. all_asked: the recorder just did, and so, most
    likely, did every process of the job.
    """
    code = None if status is None else os.waitstatus_to_exitcode(status)
    if asked or (all_asked and code in (None, -signal.SIGKILL)):
        return ExitReason.INTERRUPTED, "SIGTERM"
    if code is None:
        return ExitReason.LOST, ""
    if code >= 0:
        return ExitReason.LOST, f"exit code {code}"
    name = _signal_name(-code)
    if -code in _REQUESTS:
        return ExitReason.INTERRUPTED, name
    pressure = ", memory pressure?" if -code == signal.SIGKILL and out_of_memory else ""
    return ExitReason.LOST, f"killed by {name}{pressure}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reaped_status(descriptor: int) -> int | None:
    """Return the wait status of a process whose parent has waited for it.

    Linux 6.15 keeps it for processes that had opened this one before.
    """
    info = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(descriptor, _GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(info)
    return status if mask & _INFO_EXIT else None


def _memory_accounts(groups: str) -> list[Path]:
    """Return the files in which the kernel counts what it killed for lack of memory.

    groups: the text of a process' /proc/PID/cgroup.
    """
    accounts = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            accounts.append(_CGROUPS / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            accounts.append(_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")
    return accounts


def _oom_kills(accounts: list[Path]) -> int:
    kills = 0
    for account in accounts:
        with suppress(OSError):
            lines = account.read_text().splitlines()
            kills += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return kills
