"""Starts the recorder, and lets it finish: the only process that Foreshock starts on a training machine."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

from foreshock._log import info_once, warn_once
from foreshock_recorder.layout import NormHistory
from foreshock_recorder.paths import has_recorder
from foreshock_recorder.ring import Ring

EXIT_SECONDS = 2.0
"""Longest wait of a leaving rank for the collector's last acknowledgement."""
CHECK_SECONDS = 5.0
HISTORY_SECONDS = 5.0
"""Longest wait of rank 0, at attach, for the history of the attempt that a training resumes: a recorder takes a second
to start and to connect."""
_STARTS = 3
"""Recorders that a rank starts in a row: one that cannot run must not be started forever."""
_RENEWAL_SECONDS = 60.0
"""A recorder that has looked at the ring so long after it was started does not count among these."""


class RecorderProcess:
    """The node's recorder of a launch, as a rank sees it: somebody holds the lock, and looks at the ring."""

    def __init__(self, folder: Path, *, run: str, collector: str, python: str, logs: bool) -> None:
        self._folder = folder
        self.run = run
        self._command = [
            python or sys.executable, "-m", "foreshock_recorder", "--folder", str(folder), "--collector", collector
        ]  # fmt: skip
        self._logs = logs
        self.checked = time.monotonic()
        """Monotonic time of the newest check."""
        self._starts = 0
        self._started = -math.inf
        self._processes: list[subprocess.Popen[bytes]] = []

    def ensure(self) -> None:
        """Start a recorder unless one holds the lock. Training goes on without one, with one warning."""
        # The folder of the script must not shadow the recorder's own imports.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        try:
            if has_recorder(self._folder):
                return
            if self._starts == _STARTS:
                warn_once("recorder", f"recorders keep exiting; nothing reaches the collector ({self._log_hint()})")
                return
            self._starts += 1
            self._started = time.monotonic()
            # A session of its own, and none of our files: `torchrun | tee` ends with the job, torchrun's clean-up
            # misses it, and no socket of the job stays open with it.
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                close_fds=True,
                env=environment,
            )
        except OSError as error:
            warn_once("recorder", f"the recorder cannot start; nothing reaches the collector ({error})")
            return
        self._processes.append(process)

    def resume(self, ring: Ring) -> None:
        """Note that a training that was idle steps again: its recorder may have left since."""
        ring.write_idle(False)
        self._starts = 0

    def check(self, ring: Ring, now: float) -> None:
        """Every few seconds: start another recorder if the last one is gone, and say once what troubles it."""
        if now - self.checked < CHECK_SECONDS:
            return
        self.checked = now
        self._reap()
        if ring.recorder_seen - self._started > _RENEWAL_SECONDS:
            self._starts = 0
        if now - ring.recorder_seen > 2 * CHECK_SECONDS:
            self.ensure()
        self._log_problem(ring)
        self._log_page(ring)

    def wait_for_exit(self, ring: Ring) -> None:
        """Bounded wait until everything is stored, or nobody is left to deliver it.

        A pod dies with its first process, and takes the recorder along.
        """
        deadline = time.monotonic() + EXIT_SECONDS
        while time.monotonic() < deadline and not ring.problem:
            if ring.acknowledged >= ring.begun and ring.exit_acknowledged:
                break
            if not self._runs():
                break
            time.sleep(0.005)
        self._log_page(ring)
        self._log_problem(ring)
        if self._logs and not ring.problem and (left := ring.begun - ring.acknowledged):
            retry = "the recorder keeps trying, or" if has_recorder(self._folder) else "no recorder is running, so"
            line = f"{left} records have not reached the collector yet; {retry} a later job's recorder delivers them"
            warn_once("collector", line)
        self._reap()

    def wait_for_history(self, ring: Ring) -> NormHistory | None:
        """Bounded wait until the collector has answered what it knows of the attempt before; None if it has not."""
        deadline = time.monotonic() + HISTORY_SECONDS
        while (found := ring.history) is None and time.monotonic() < deadline and not ring.problem and self._runs():
            time.sleep(0.005)
        return found

    def _runs(self) -> bool:
        # One that has just been started holds no lock yet.
        return any(process.poll() is None for process in self._processes) or has_recorder(self._folder)

    def _reap(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                # It outlives us by design: keep the interpreter from warning about it at exit.
                process.returncode = 0
        self._processes.clear()

    def _log_problem(self, ring: Ring) -> None:
        if self._logs and ring.problem:
            warn_once("collector", f"the collector accepts no records; training continues ({ring.problem})")

    def _log_page(self, ring: Ring) -> None:
        page = ring.page
        if self._logs and page:
            run = unquote(page.rpartition("/")[2])
            other = "" if run == self.run else f"; the name {self.run} is in use by another run"
            info_once(f"page {page}", f"run {run}: {page}{other}")

    def _log_hint(self) -> str:
        log = self._folder / "recorder.log"
        return f"see {log}" if log.exists() else f"try {shlex.join(self._command)}"
