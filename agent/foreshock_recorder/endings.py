"""How a rank ended that could not say so itself: by its exit status, and what the kernel counts of lacking memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

from foreshock_recorder.ring import Farewell, process_start

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which a user or a scheduler ends a job."""
_CGROUPS = Path("/sys/fs/cgroup")
_INFO = struct.Struct("QQ11Ii")
"""struct pidfd_info: what is asked for and answered, the control group, ids, the wait status."""
_GET_INFO, _INFO_EXIT = 0xC040FF0B, 8
"""PIDFD_GET_INFO for that struct, PIDFD_INFO_EXIT."""


class Ending:
    """Watches one process from now until it ends. Needs a running loop.

    pid, started: as the rank wrote them; where no such process is seen here, nothing will be known of its end.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.status: int | None = None
        """Its wait status; None while it runs, or where its parent was faster and the kernel is an older one."""
        self._pid, self._started = pid, started
        self._accounts: list[Path] = []
        self._kills = 0
        self._descriptor: int | None = None
        with suppress(OSError):
            descriptor = os.pidfd_open(pid)
            if process_start(pid) != started:
                os.close(descriptor)
                return
            self._descriptor = descriptor
            self._accounts = _memory_accounts(Path(f"/proc/{pid}/cgroup").read_text())
            self._kills = _oom_kills(self._accounts)
            asyncio.get_running_loop().add_reader(descriptor, self._ended)

    @property
    def pending(self) -> bool:
        """It is watched, and runs."""
        return self._descriptor is not None

    @property
    def out_of_memory(self) -> bool:
        """Since then, the kernel has killed a process of its control group for lack of memory."""
        return _oom_kills(self._accounts) > self._kills

    def close(self) -> None:
        """Watch no longer."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _ended(self) -> None:
        # At once: when its parent has fetched it, only a newer kernel can be asked any more.
        assert self._descriptor is not None
        self.status = _zombies_status(self._pid, self._started)
        if self.status is None:
            self.status = _reaped_status(self._descriptor)
        self.close()


def farewell_of(status: int | None, *, out_of_memory: bool, asked: bool, all_asked: bool) -> tuple[Farewell, str]:
    """How a rank left, and what is known of it, for its goodbye.

    status: its wait status, None: unknown. asked: it was sent SIGTERM. all_asked: the recorder was, just now: so was,
    most likely, every process of the job.
    """
    code = None if status is None else os.waitstatus_to_exitcode(status)
    if asked or (all_asked and code in (None, -signal.SIGKILL)):
        return Farewell.INTERRUPTED, "SIGTERM"
    if code is None:
        return Farewell.LOST, ""
    if code >= 0:
        return Farewell.LOST, f"exit code {code}"
    name = _signal_name(-code)
    if -code in _REQUESTS:
        return Farewell.INTERRUPTED, name
    pressure = ", memory pressure?" if -code == signal.SIGKILL and out_of_memory else ""
    return Farewell.LOST, f"killed by {name}{pressure}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _zombies_status(pid: int, started: int) -> int | None:
    """Of a process that has ended and that nobody has waited for yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return int(fields[-1]) if int(fields[19]) == started and fields[0] in (b"Z", b"X") else None


def _reaped_status(descriptor: int) -> int | None:
    """Of a process whose parent has waited for it: Linux 6.15 keeps it for whoever had opened the process before."""
    info = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(descriptor, _GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(info)
    return status if mask & _INFO_EXIT else None


def _memory_accounts(groups: str) -> list[Path]:
    """Files in which the kernel counts what it has killed for lack of memory. groups: a process' /proc/PID/cgroup."""
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
